"""Which nodes stand between a head's statistics and a scalar: the *tail*, read from the graph.

The tail is the subgraph between the statistics and one scalar through which all of its gradient flows. It may be
differentiated alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from heapq import heapify, heappop, heappush

from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true, sym_eq

from fusedhead.graph.effects import effects
from fusedhead.graph.facts import GraphFacts, before
from fusedhead.graph.nodes import fake, name_of
from fusedhead.kernels.contract import LINEAR_STATS, LOSS_OUTPUTS, STATS

SUMS = frozenset({"add", "__add__", "__radd__"})


def differentiable(node: Node) -> bool:
    """Whether gradients flow through a node's value, or through one of several (the pieces of ``chunk``)."""
    value = fake(node)
    values = value if isinstance(value, (list, tuple)) else (value,)
    return any(isinstance(v, Tensor) and v.requires_grad for v in values)


def tails(statistics: Sequence[Node]) -> Iterator[list[Node]]:
    """Tails to try: the differentiable nodes from the statistics to a scalar they all meet in, longest first.

    The longest is the best: the further down the scalar, the likelier its upstream gradient is exactly 1. A scalar
    ends one if all that was reached before it leads to it and nowhere else, which one look along the nodes tells.
    """
    reached = reached_from(statistics)
    at = {node: i for i, node in enumerate(reached)}
    furthest = max((last_use(node, at) for node in statistics), default=-1)
    ends = []
    for i, node in enumerate(reached):
        if furthest <= i:
            ends.append(i)
        use = last_use(node, at)
        if use < 0:  # a dead end: what comes after it is not all that the statistics lead to
            break
        furthest = max(furthest, use)
    for end in reversed(ends):
        value = fake(reached[end])
        if isinstance(value, Tensor) and statically_known_true(sym_eq(value.numel(), 1)):
            yield reached[: end + 1]


def reached_from(statistics: Sequence[Node]) -> list[Node]:
    """The differentiable nodes that are computed from the statistics, in order."""
    seen, reached = set(statistics), []
    ahead = list({user for node in statistics for user in node.users if user not in seen})
    seen.update(ahead)
    heapify(ahead)  # type: ignore[type-var]
    while ahead:
        node = heappop(ahead)  # type: ignore[type-var]
        if not node.op.startswith("call_") or not differentiable(node):
            continue
        reached.append(node)
        for user in node.users:
            if user not in seen:
                seen.add(user)
                heappush(ahead, user)  # type: ignore[type-var]
    return reached


def last_use(node: Node, at: dict[Node, int]) -> float:
    """The place in a tail of the last node through which gradients reach ``node``: -1 for none, inf for another."""
    last: float = -1
    for user in node.users:
        if user in at:
            last = max(last, at[user])
        elif not user.op.startswith("call_") or differentiable(user):
            return math.inf
    return last


def gradient_transparent(tail: Sequence[Node], statistics: Sequence[Node]) -> dict[Node, Node]:
    """Scalar ``x + other`` nodes of a tail, with x: d(x + other)/dx = 1, so that the node shares the gradient of x.

    A loop over pieces of the tokens adds up its losses by one such node for each piece that is left.
    """
    inside, shares = {*statistics, *tail}, {}
    for node in tail:
        within = [a for a in node.args if isinstance(a, Node) and a in inside]
        if name_of(node) not in SUMS or len(node.args) != 2 or node.kwargs or len(within) != 1:
            continue
        value, was = fake(node), fake(within[0])
        if value.dtype == was.dtype and value.ndim == was.ndim == 0:
            shares[node] = within[0]
    return shares


def squares_of_lse(statistics: Sequence[Node], tail: Sequence[Node]) -> list[Node]:
    """The nodes of the tail that are lse², element by element (a z-loss): statistics of their own to `head_loss`."""
    same = {node for node in statistics if name_index(node) == 0}
    squares = []
    for node in tail:
        name, args = name_of(node), node.args
        if name in ("view", "reshape", "flatten") and args[0] in same:
            same.add(node)
        squared = (name in ("pow", "__pow__") and args[1:] == (2,)) or name == "square"
        squared |= name in ("mul", "multiply") and len(args) == 2 and args[0] is args[1]
        if squared and args[0] in same:
            squares.append(node)
    return squares


def depends_on(nodes: Sequence[Node], call: Node) -> Node | None:
    """The first of ``nodes`` that is computed from the call's results."""
    independent: set[Node] = set()
    for node in nodes:
        stack = [node]
        while stack:
            source = stack.pop()
            if source is call:
                return node
            if source not in independent and before(call, source):
                independent.add(source)
                stack += source.all_input_nodes
    return None


def computed_from(start: Node) -> set[Node]:
    """``start`` and every node that reads it, directly or not."""
    reached, stack = {start}, [start]
    while stack:
        fresh = [user for user in stack.pop().users if user not in reached]
        reached.update(fresh)
        stack += fresh
    return reached


def writes_into(call: Node, scalar: Node, facts: GraphFacts) -> Node | None:
    """A node that writes to something between the head and the scalar.

    By names, not by memory: the fake values of old nodes do not know yet that they are views of new ones.
    """
    writers = list(facts.writers(call, call.graph.output_node()))
    if not writers:
        return None
    between = computed_from(call) - computed_from(scalar)
    for node in writers:
        does = effects(node)
        if does.anything or not between.isdisjoint((*does.written, *does.backward)):
            return node
    return None


def first_use(statistics: Sequence[Node]) -> Node:
    return min(user for node in statistics for user in node.users)  # type: ignore[type-var]


def name_index(statistic: Node) -> int:
    """Which output of ``head_stats`` a getitem reads; lse, picked, sum have the same place in ``head_loss``."""
    assert STATS[: len(LINEAR_STATS)] == LOSS_OUTPUTS[: len(LINEAR_STATS)] == LINEAR_STATS
    return int(statistic.args[1])  # type: ignore[arg-type]
