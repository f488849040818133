"""What makes a readable site unsafe to rewrite: mutation, functorch, tensor subclasses.

Each check returns a sentence, or None. The rewrite reads h, W and the labels at another place of the graph than
the program did; nothing may change them in between. This file decides nothing about profit.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, Node

from fusedhead.aliases import memory
from fusedhead.anchors import candidates
from fusedhead.effects import memory_written, reaches_far, written_in_backward
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
    """The writes of one graph, by position and by memory; ``places`` while the graph is edited.

    Nodes are asked what they write when it first matters, so that the graph before the heads costs little; all from
    ``since`` on at once, before they are edited.
    """

    def __init__(self, graph: Graph, enabled: bool | None = None, since: Node | None = None) -> None:
        self.position = {node: i for i, node in enumerate(graph.nodes)}
        self.places = Places(graph, enabled)
        self.reaching: dict[int, list[Node]] = {}  # memory -> the nodes that are given it, in order
        self.unsure: list[Node] = []  # what may write to memory that it is not given
        held = {node: memory(node) for node in graph.nodes}
        for node in graph.nodes:
            if node.op.startswith("call_"):
                for at in set().union(*map(held.__getitem__, node.all_input_nodes)):
                    self.reaching.setdefault(at, []).append(node)
                if reaches_far(node):
                    self.unsure.append(node)
        self.changed: dict[Node, set[int]] = {}  # the memory that a node writes to, as it was when asked
        if since is not None:
            self.places.ask(since)
            self.changed = {node: memory_written(node) for node in self.places.writers}

    def changes(self, node: Node) -> set[int]:
        if node not in self.changed:
            self.changed[node] = memory_written(node)
        return self.changed[node]

    def candidates(self, read: set[int], begin: int, end: float) -> Iterator[Node]:
        """The nodes in [begin, end) that may write to some memory."""
        for nodes in (*(self.reaching.get(at, ()) for at in read), self.unsure):
            for i in range(bisect_left(nodes, begin, key=self.position.__getitem__), len(nodes)):
                if self.position[nodes[i]] >= end:
                    break
                yield nodes[i]

    def first(self, begin: int, end: float, read: Iterable[Node]) -> tuple[Node, Node] | None:
        """The first write in [begin, end) to memory of a tensor in ``read``, and the last such tensor.

        Where there is no end, so does a backward that may write to it, from wherever its forward is.
        """
        held = {node: memory(node) for node in read}
        at = set().union(*held.values())
        found = [node for node in self.candidates(at, begin, end) if not self.changes(node).isdisjoint(at)]
        changed = self.changes
        if not found and end == math.inf:
            found = [node for node in self.candidates(at, 0, end) if not backward_memory(node).isdisjoint(at)]
            changed = backward_memory
        if not found:
            return None
        writer = min(found, key=self.position.__getitem__)
        return writer, [node for node, own in held.items() if not own.isdisjoint(changed(writer))][-1]

    def between(self, begin: Node, end: Node, read: Iterable[Node]) -> str | None:
        """A sentence if a tensor that shares memory with ``read`` is written in [begin, end)."""
        found = self.first(self.position[begin], self.position[end], read)
        return found and f"{name_of(found[0])} at {where(found[0])} changes {found[1].name} in place before the loss"

    def anywhere_after(self, begin: Node, read: Iterable[Node]) -> str | None:
        found = self.first(self.position[begin], math.inf, read)
        return found and f"{name_of(found[0])} at {where(found[0])} changes {found[1].name} in place"


def backward_memory(node: Node) -> set[int]:
    return set().union(*map(memory, written_in_backward(node)))


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
