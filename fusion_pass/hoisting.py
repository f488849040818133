"""Moving what a loss's coefficients are made of before the head, where that changes no number and no gradient.

A node may be moved unless something on the way makes it another node: a write to memory, another draw of random
numbers, another grad mode, another autocast. This file knows no heads and no losses.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import maybe_get_fake_mode
from torch.fx import Graph, Node
from torch.fx.node import map_arg
from torch.utils._python_dispatch import TorchDispatchMode

from fusedhead.aliases import storage, written
from fusedhead.modes import autocasts
from fusedhead.read import callee, fake

RANDOM = torch.Tag.nondeterministic_seeded


def random(op: Node) -> bool:
    """Whether an ATen node draws random numbers: computed a second time, it is another number."""
    return RANDOM in getattr(op.target, "tags", ())


class Draws(TorchDispatchMode):
    """Sees whether anything that runs draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.any = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.any |= RANDOM in func.tags
        return func(*args, **(kwargs or {}))


def may_draw(node: Node) -> bool:
    """Whether a Dynamo node draws random numbers, or cannot be run on its fake inputs to find out."""
    try:
        args, kwargs = map_arg((node.args, node.kwargs), fake)
        modes = filter(None, map(maybe_get_fake_mode, map(fake, [node, *node.all_input_nodes])))
        with next(modes), torch.no_grad(), Draws() as seen:
            callee(node)(*args, **kwargs)
        return seen.any
    except Exception:
        return True


def floating(nodes: Iterable[Node]) -> bool:
    return any(isinstance(v, Tensor) and v.is_floating_point() for v in map(fake, nodes))


def overwritten(nodes: Sequence[Node], begin: Node, end: Node) -> bool:
    """Whether memory that ``nodes`` share is written between two nodes."""
    memory, inside = {storage(fake(node)) for node in nodes} - {None}, False
    for node in begin.graph.nodes:
        inside = (inside or node is begin) and node is not end
        if inside and any(storage(fake(target)) in memory for target in written(node)):
            return True
    return False


def hoist(graph: Graph, nodes: Sequence[Node], anchor: Node, recorded: dict[Node, bool]) -> str:
    """Move ``nodes`` and what they are computed from before ``anchor``; else the sentence that says what forbids it.

    ``recorded``: whether gradients are recorded at each node.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    late, stack = set(), list(nodes)
    while stack:
        node = stack.pop()
        if order[node] > order[anchor] and node not in late:
            late.add(node)
            stack.extend(node.all_input_nodes)
    if not late:
        return ""
    begin, end = order[anchor], max(order[n] for n in late)
    if any(True for n in graph.nodes if begin <= order[n] <= end for _ in written(n)):
        return "an operand of the loss is computed in place after the head"
    regions = autocasts(graph)
    for node in late:
        sources = node.all_input_nodes
        if regions[node] != regions[anchor] and floating([node, *sources]):
            return f"{node.name}, an operand of the loss, is computed under another autocast than the head"
        learning = any(isinstance(fake(s), Tensor) and fake(s).requires_grad for s in sources)
        if recorded[node] != recorded[anchor] and learning:
            return f"{node.name}, an operand of the loss, is computed where no gradient is recorded"
        if may_draw(node):
            return f"{node.name}, an operand of the loss, may draw random numbers after the head"
    for node in sorted(late, key=order.__getitem__):
        anchor.prepend(node)
    return ""
