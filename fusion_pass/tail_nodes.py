"""Which nodes stand between a head's statistics and a scalar: the *tail*, read from the graph.

A tail is what may be differentiated alone: every gradient that reaches its nodes comes from its scalar. This file
reads nodes and their fake values only; it must not know what a tail is wanted for, and changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true, sym_eq

from fusedhead.aliases import written
from fusedhead.kernels.contract import STATS
from fusedhead.read import fake, name_of

LINEAR_STATS = ("lse", "picked", "sum")


def differentiable(node: Node) -> bool:
    value = fake(node)
    return isinstance(value, Tensor) and value.requires_grad


def tails(statistics: Sequence[Node]) -> list[list[Node]]:
    """Tails to try: the differentiable nodes from the statistics to a scalar they all meet in, longest first.

    The longest is the best: the further down the scalar, the likelier its upstream gradient is exactly 1.
    """
    reached, tail = set(statistics), []
    for node in statistics[0].graph.nodes:
        fresh = node.op.startswith("call_") and node not in reached
        if fresh and any(source in reached for source in node.all_input_nodes) and differentiable(node):
            reached.add(node)
            tail.append(node)
    found = []
    for end in reversed(range(len(tail))):
        scalar, inside = tail[end], ancestors(tail[end], tail)
        single = statically_known_true(sym_eq(fake(scalar).numel(), 1))
        if single and all(closed(n, {*inside, scalar}, scalar) for n in [*statistics, *inside]):
            found.append([*inside, scalar])
    return found


def ancestors(node: Node, among: Sequence[Node]) -> list[Node]:
    """The nodes of ``among`` that ``node`` is computed from, in order."""
    allowed, found, stack = set(among), set(), list(node.all_input_nodes)
    while stack:
        source = stack.pop()
        if source in allowed and source not in found:
            found.add(source)
            stack.extend(source.all_input_nodes)
    return [n for n in among if n in found]


def closed(node: Node, inside: set[Node], scalar: Node) -> bool:
    """Whether every gradient through ``node`` comes from inside the tail."""
    return node is scalar or all(user in inside or (user.op.startswith("call_") and not differentiable(user))
                                 for user in node.users)  # fmt: skip


def squares_of_lse(statistics: Sequence[Node], tail: Sequence[Node]) -> list[Node]:
    """The nodes of the tail that are lse², element by element (a z-loss): statistics of their own to `head_loss`."""
    same = {node for node in statistics if name_index(node) == 0}
    found = []
    for node in tail:
        name, args = name_of(node), node.args
        if name in ("view", "reshape", "flatten") and args[0] in same:
            same.add(node)
        squared = (name in ("pow", "__pow__") and args[1:] == (2,)) or name == "square"
        squared |= name in ("mul", "multiply") and len(args) == 2 and args[0] is args[1]
        if squared and args[0] in same:
            found.append(node)
    return found


def depends_on(nodes: Sequence[Node], call: Node) -> Node | None:
    """The first of ``nodes`` that is computed from the call's results."""
    reached = computed_from(call)
    return next((node for node in nodes if node in reached), None)


def computed_from(start: Node) -> set[Node]:
    """``start`` and every node that reads it, directly or not."""
    reached, stack = {start}, [start]
    while stack:
        fresh = [user for user in stack.pop().users if user not in reached]
        reached.update(fresh)
        stack += fresh
    return reached


def writes_into(call: Node, scalar: Node) -> Node | None:
    """A node that writes to something between the head and the scalar.

    By names, not by memory: the fake values of old nodes do not know yet that they are views of new ones.
    """
    reached = computed_from(call)
    between = reached - computed_from(scalar)
    return next((node for node in reached if any(target in between for target in written(node))), None)


def first_use(graph: Graph, statistics: Sequence[Node]) -> Node:
    users = {user for node in statistics for user in node.users}
    return next(node for node in graph.nodes if node in users)


def name_index(statistic: Node) -> int:
    """Which output of ``head_stats`` a getitem reads; lse, picked, sum have the same place in ``head_loss``."""
    assert STATS[:3] == LINEAR_STATS
    return int(statistic.args[1])  # type: ignore[arg-type]
