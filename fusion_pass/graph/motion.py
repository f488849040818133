"""Moving what a loss's coefficients are made of before the head, or what is made of a loss behind another one, where
that changes no number and no gradient.

A node may be moved unless something on the way makes it another node: a write to memory, another draw of random
numbers, another grad mode, another autocast. This file knows no heads and no losses.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from torch import Tensor
from torch.fx import Node

from fusedhead.graph.aliases import memory
from fusedhead.graph.dry_run import RANDOM
from fusedhead.graph.effects import draws, memory_written, writes
from fusedhead.graph.facts import Places, before
from fusedhead.graph.nodes import fake


def random(op: Node) -> bool:
    """Whether an ATen node draws random numbers: computed a second time, it is another number."""
    return RANDOM in getattr(op.target, "tags", ())


def floating(nodes: Iterable[Node]) -> bool:
    return any(isinstance(v, Tensor) and v.is_floating_point() for v in map(fake, nodes))


def overwritten(nodes: Sequence[Node], begin: Node, end: Node, places: Places) -> bool:
    """Whether memory that ``nodes`` share is written between two nodes."""
    read = set().union(*map(memory, nodes))
    return any(not read.isdisjoint(memory_written(node)) for node in places.writes(begin, end))


def after(nodes: Iterable[Node], anchor: Node, most: int | None = None) -> set[Node]:
    """``nodes`` and what they are computed from, as far as it is run after ``anchor``; no more than ``most`` + 1."""
    late: set[Node] = set()
    stack = list(nodes)
    while stack and (most is None or len(late) <= most):
        node = stack.pop()
        if before(anchor, node) and node not in late:
            late.add(node)
            stack.extend(node.all_input_nodes)
    return late


def hoist(nodes: Sequence[Node], anchor: Node, places: Places) -> str:
    """Move ``nodes`` and what they are computed from before ``anchor``; else the sentence that says what forbids it."""
    late = sorted(after(nodes, anchor))  # type: ignore[type-var]
    if not late:
        return ""
    if any(True for _ in places.writes(anchor, late[-1])) or writes(late[-1]):
        return "an operand of the loss is computed in place after the head"
    region, recorded = places.autocast(anchor), places.recorded(anchor)
    for node in late:
        sources = node.all_input_nodes
        if places.autocast(node) != region and floating([node, *sources]):
            return f"{node.name}, an operand of the loss, is computed under another autocast than the head"
        learning = any(isinstance(fake(s), Tensor) and fake(s).requires_grad for s in sources)
        if places.recorded(node) != recorded and learning:
            return f"{node.name}, an operand of the loss, is computed where no gradient is recorded"
        if draws(node):
            return f"{node.name}, an operand of the loss, may draw random numbers after the head"
    for node in late:
        anchor.prepend(node)
    return ""


def brought(
    nodes: Sequence[Node], anchor: Node, fixed: Collection[Node], places: Places, most: int | None = None
) -> bool:
    """Whether ``nodes`` are computed before ``anchor``, or now were moved there.

    Not where that would move one of ``fixed``, what is made of the anchor itself, or more than ``most`` nodes.
    """
    late = after(nodes, anchor, most)
    from_anchor = anchor in nodes or any(anchor in node.all_input_nodes for node in late)
    if from_anchor or not late.isdisjoint(fixed) or (most is not None and len(late) > most):
        return False
    return hoist(nodes, anchor, places) == ""


def put_behind(nodes: Sequence[Node], anchor: Node, fixed: Collection[Node], places: Places, most: int) -> bool:
    """Whether all that is made of ``nodes`` is run behind ``anchor``, or now was moved there.

    Not where that would move one of ``fixed``, or more than ``most`` nodes.
    """
    early: set[Node] = set()
    stack = [user for node in nodes for user in node.users]
    while stack and len(early) <= most:
        node = stack.pop()
        if before(node, anchor) and node not in early:
            early.add(node)
            stack.extend(node.users)
    if not early.isdisjoint(fixed) or len(early) > most:
        return False
    moved = sorted(early)  # type: ignore[type-var]
    read = [source for node in moved for source in (node, *node.all_input_nodes)]
    if moved and (any(map(writes, moved)) or overwritten(read, moved[0], anchor, places)):
        return False
    for node in moved:
        if places.autocast(node) != places.autocast(anchor) or places.recorded(node) != places.recorded(anchor):
            return False
        if draws(node):
            return False
    for node in reversed(moved):
        anchor.append(node)
    return True
