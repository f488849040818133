"""Code motion: hoists operands of a loss above the head call, or sinks uses of a result below a later node.

A node may move unless something between changes its numbers or its gradient: a write to its memory, a draw of random
numbers, a change of the grad mode or of autocast.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from torch import Tensor
from torch.fx import Node

from fusedhead.graph.aliases import storages
from fusedhead.graph.dry_run import RANDOM
from fusedhead.graph.effects import draws, memory_written, writes
from fusedhead.graph.facts import GraphFacts, before
from fusedhead.graph.nodes import fake
from fusedhead.graph.reasons import Reason, Refusal, refuse


def random(op: Node) -> bool:
    """Whether an ATen node draws random numbers, so that a second run gives other numbers."""
    return RANDOM in getattr(op.target, "tags", ())


def floating(nodes: Iterable[Node]) -> bool:
    return any(isinstance(v, Tensor) and v.is_floating_point() for v in map(fake, nodes))


def overwritten_between(nodes: Sequence[Node], begin: Node, end: Node, facts: GraphFacts) -> bool:
    """Whether memory that ``nodes`` share is written between two nodes."""
    read = set().union(*map(storages, nodes))
    return any(not read.isdisjoint(memory_written(node)) for node in facts.writers(begin, end))


def dependencies_after(nodes: Iterable[Node], anchor: Node, most: int | None = None) -> set[Node]:
    """``nodes`` and their dependencies that run after ``anchor``; at most ``most`` + 1 of them."""
    dependencies: set[Node] = set()
    stack = list(nodes)
    while stack and (most is None or len(dependencies) <= most):
        node = stack.pop()
        if before(anchor, node) and node not in dependencies:
            dependencies.add(node)
            stack.extend(node.all_input_nodes)
    return dependencies


class Immovable(Reason):
    WRITES = "an operand of the loss is computed in place after the head"
    AUTOCAST = "{name}, an operand of the loss, is computed under another autocast than the head"
    GRAD_MODE = "{name}, an operand of the loss, is computed where no gradient is recorded"
    RANDOM = "{name}, an operand of the loss, may draw random numbers after the head"


def hoist(nodes: Sequence[Node], anchor: Node, facts: GraphFacts) -> Refusal | None:
    """Move ``nodes`` and their dependencies before ``anchor``, or return the reason that forbids it."""
    moved = sorted(dependencies_after(nodes, anchor))  # type: ignore[type-var]
    if not moved:
        return None
    if any(True for _ in facts.writers(anchor, moved[-1])) or writes(moved[-1]):
        return refuse(Immovable.WRITES)
    region, recorded = facts.autocast(anchor), facts.grad_mode(anchor)
    for node in moved:
        sources = node.all_input_nodes
        if facts.autocast(node) != region and floating([node, *sources]):
            return refuse(Immovable.AUTOCAST, node=node, name=node.name)
        trains = any(isinstance(fake(s), Tensor) and fake(s).requires_grad for s in sources)
        if facts.grad_mode(node) != recorded and trains:
            return refuse(Immovable.GRAD_MODE, node=node, name=node.name)
        if draws(node):
            return refuse(Immovable.RANDOM, node=node, name=node.name)
    for node in moved:
        anchor.prepend(node)
    return None


def hoist_before(
    nodes: Sequence[Node], anchor: Node, fixed: Collection[Node], facts: GraphFacts, most: int | None = None
) -> bool:
    """Move ``nodes`` before ``anchor`` where they are not there already; returns whether they are there now.

    Refuses to move a node in ``fixed``, a node that depends on the anchor, or more than ``most`` nodes.
    """
    moved = dependencies_after(nodes, anchor, most)
    from_anchor = anchor in nodes or any(anchor in node.all_input_nodes for node in moved)
    if from_anchor or not moved.isdisjoint(fixed) or (most is not None and len(moved) > most):
        return False
    return hoist(nodes, anchor, facts) is None


def sink_after(nodes: Sequence[Node], anchor: Node, fixed: Collection[Node], facts: GraphFacts, most: int) -> bool:
    """Move all users of ``nodes`` after ``anchor``; returns whether they are there now.

    Refuses to move a node in ``fixed``, or more than ``most`` nodes.
    """
    users: set[Node] = set()
    stack = [user for node in nodes for user in node.users]
    while stack and len(users) <= most:
        node = stack.pop()
        if before(node, anchor) and node not in users:
            users.add(node)
            stack.extend(node.users)
    if not users.isdisjoint(fixed) or len(users) > most:
        return False
    moved = sorted(users)  # type: ignore[type-var]
    read = [source for node in moved for source in (node, *node.all_input_nodes)]
    if moved and (any(map(writes, moved)) or overwritten_between(read, moved[0], anchor, facts)):
        return False
    for node in moved:
        if facts.autocast(node) != facts.autocast(anchor) or facts.grad_mode(node) != facts.grad_mode(anchor):
            return False
        if draws(node):
            return False
    for node in reversed(moved):
        anchor.append(node)
    return True
