"""The loss tail: the nodes of the graph between a head's statistics and a scalar.

The tail is the subgraph between the statistics and one scalar through which all of its gradient flows. It can be
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


def needs_of(call: Node) -> list[bool]:
    """Which of h, w, cols, rows of a sweep want a gradient."""
    h, w, _, cols, rows, _ = call.args[:6]
    return [differentiable(n) for n in (h, w, cols, rows)]  # type: ignore[arg-type]


def tails(statistics: Sequence[Node]) -> Iterator[list[Node]]:
    """Tails to try, the longest first: the differentiable nodes from the statistics to a scalar in which all of them
    meet.

    The longest is the best: the later the scalar, the likelier its upstream gradient is exactly 1. A scalar ends a tail
    if every node reached before it leads to it and nowhere else.
    """
    reached = reached_from(statistics)
    at = {node: i for i, node in enumerate(reached)}
    furthest = max((last_use(node, at) for node in statistics), default=-1)
    ends = []
    for i, node in enumerate(reached):
        if furthest <= i:
            ends.append(i)
        use = last_use(node, at)
        if use < 0:  # a dead end: no later scalar depends on this node
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
    """The index of the last node of a tail through which gradients reach ``node``: -1: none, inf: one outside."""
    last: float = -1
    for user in node.users:
        if user in at:
            last = max(last, at[user])
        elif not user.op.startswith("call_") or differentiable(user):
            return math.inf
    return last


def gradient_transparent(tail: Sequence[Node], statistics: Sequence[Node]) -> dict[Node, Node]:
    """Scalar ``x + other`` nodes of a tail, with x: d(x + other)/dx = 1, so that the node shares the gradient of x.

    A loop over pieces of the tokens adds its losses with one such node a piece.
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
    """The nodes of the tail that are lse² elementwise (a z-loss), which are statistics of `head_loss`."""
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
    """The first of ``nodes`` that depends on the call's results."""
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
    """``start`` and every node that depends on it."""
    reached, stack = {start}, [start]
    while stack:
        fresh = [user for user in stack.pop().users if user not in reached]
        reached.update(fresh)
        stack += fresh
    return reached


def writes_into(call: Node, scalar: Node, facts: GraphFacts) -> Node | None:
    """A node that writes to something between the head and the scalar.

    Nodes are compared and not memory: the fake values of old nodes are not views of those of new nodes.
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
    """The output of ``head_stats`` that a getitem reads; lse, picked and sum have the same index in ``head_loss``."""
    assert STATS[: len(LINEAR_STATS)] == LOSS_OUTPUTS[: len(LINEAR_STATS)] == LINEAR_STATS
    return int(statistic.args[1])  # type: ignore[arg-type]
