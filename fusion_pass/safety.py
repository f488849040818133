"""What makes a readable site unsafe to rewrite: mutation, functorch, tensor subclasses.

Each check returns a sentence, or None. The rewrite reads h, W and the labels at another place of the graph than
the program did; nothing may change them in between. This file decides nothing about profit.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.fx import Graph, Node

from fusedhead.aliases import storage, written
from fusedhead.anchors import candidates
from fusedhead.compat import FakeTensor
from fusedhead.interpret import Site
from fusedhead.places import Places
from fusedhead.read import fake, name_of, where
from fusedhead.rules.table import Family

FAMILY = Family(
    "where",
    "training, `no_grad`, `inference_mode`, autocast, activation checkpointing, `nested_compile_region`, gradient "
    "accumulation, several heads, `dynamic=True`, `mode=`",
    "inside `torch.func` transforms; DTensor and other tensor subclasses; where hidden states, weight or labels are "
    "written between the projection and the loss",
)


class Mutations:
    """The in-place writes of one graph, by position and by memory; ``places`` while the graph is edited."""

    def __init__(self, graph: Graph, enabled: bool | None = None) -> None:
        self.position = {node: i for i, node in enumerate(graph.nodes)}
        self.places = Places(graph, enabled)
        self.writes: dict[int | None, list[Node]] = {}  # memory -> the nodes that write there, in order
        for node in self.places.writers:
            for memory in {storage(fake(target)) for target in written(node)} - {None}:
                self.writes.setdefault(memory, []).append(node)

    def first(self, begin: int, end: float, read: Iterable[Node]) -> tuple[Node, Node] | None:
        """The first write in [begin, end) to memory of a tensor in ``read``, and the last such tensor."""
        if not self.writes:
            return None
        memory = {storage(fake(node)): node for node in read}
        found = []
        for shared in memory.keys() & self.writes.keys():
            nodes = self.writes[shared]
            at = bisect_left(nodes, begin, key=self.position.__getitem__)
            if at < len(nodes) and self.position[nodes[at]] < end:
                found.append((self.position[nodes[at]], nodes[at], memory[shared]))
        return min(found)[1:] if found else None

    def between(self, begin: Node, end: Node, read: Iterable[Node]) -> str | None:
        """A sentence if a tensor that shares memory with ``read`` is written in [begin, end)."""
        found = self.first(self.position[begin], self.position[end], read)
        return found and f"{name_of(found[0])} at {where(found[0])} changes {found[1].name} in place before the loss"

    def anywhere_after(self, begin: Node, read: Iterable[Node]) -> str | None:
        found = self.first(self.position[begin], math.inf, read)
        return found and f"{name_of(found[0])} at {where(found[0])} changes {found[1].name} in place"


def functorch(graph: Graph) -> str | None:
    """torch.func transforms need batching and double-backward rules that the fused ops do not have.

    One that has ended before the first head (a mask made with ``vmap``) is none of its business.
    """
    heads = candidates(graph)
    depth, reached = 0, not heads
    for node in graph.nodes:
        module = getattr(node.target, "__module__", None) or ""
        if node.op == "call_function" and "_functorch" in f"{module}.{node.target}":
            depth += ("increment_nesting" in name_of(node)) - ("decrement_nesting" in name_of(node))
            if reached:
                return f"the graph is inside a torch.func transform ({name_of(node)})"
        if node in heads:
            reached = True
            if depth:
                return "the head is inside a torch.func transform"
    return None


def subclass(site: Site, read: Iterable[Node]) -> str | None:
    """Operands must be plain tensors: DTensor, quantised and other subclasses have semantics of their own."""
    for node in [*read, *site.followed]:
        value = fake(node)
        plain = type(value) in (FakeTensor, torch.nn.Parameter) or not isinstance(value, Tensor)
        if not plain or (isinstance(value, Tensor) and value.is_sparse):
            return f"{node.name} is a {type(value).__name__}, not a plain tensor"
    return None
