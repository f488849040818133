"""What makes a readable site unsafe to rewrite: mutation, functorch, tensor subclasses.

Each check returns a sentence, or None. The rewrite reads h, W and the labels at another place of the graph than
the program did; nothing may change them in between. This file decides nothing about profit.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Collection, Iterable, Iterator

import torch
from torch import Tensor
from torch.fx import Graph, Node

from fusedhead.analysis.interpreter import Site
from fusedhead.analysis.projections import candidates
from fusedhead.compat import FakeTensor, HigherOrderOperator
from fusedhead.graph.aliases import memory
from fusedhead.graph.effects import memory_written, memory_written_in_backward, reaches_far
from fusedhead.graph.facts import Places
from fusedhead.graph.nodes import fake, name_of, where
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

    Nodes from ``since`` on are asked what they write at once, before they are edited; the graph before, of a model's
    layers, only where the memory in question is given to a node. ``calls``: the nodes of other graphs that run this
    one; what is written behind them is written after it.
    """

    def __init__(
        self, graph: Graph, enabled: bool | None = None, since: Node | None = None, calls: Collection[Node] = ()
    ) -> None:
        self.calls = calls
        self.position = {node: i for i, node in enumerate(graph.nodes)}
        self.places = Places(graph, enabled)
        self.since = len(self.position)
        self.writes: dict[int, list[Node]] = {}  # memory -> the nodes from ``since`` on that write there, in order
        self.given: dict[int, list[Node]] = {}  # memory -> the nodes that are given it, in order
        self.far: list[Node] = []  # what may write to memory that it is not given
        self.special: set[Node] = set()  # what may have a backward of somebody's own
        held = {node: memory(node) for node in graph.nodes}
        for node in graph.nodes:
            if node.op.startswith("call_"):
                for at in set().union(*map(held.__getitem__, node.all_input_nodes)):
                    self.given.setdefault(at, []).append(node)
                if reaches_far(node):
                    self.far.append(node)
                if isinstance(node.target, HigherOrderOperator) or reaches_far(node):
                    self.special.add(node)
        if since is not None:
            self.ask(since)

    def ask(self, since: Node) -> None:
        self.since = self.position[since]
        self.places.ask(since)
        for node in self.places.writers:
            for at in memory_written(node):
                self.writes.setdefault(at, []).append(node)

    def writers(self, read: set[int], begin: int, end: float) -> Iterator[Node]:
        """The nodes in [begin, end) that write to some memory, the first one for each storage."""
        for at in read:
            if begin < self.since:
                early = [node for node in (*self.given.get(at, ()), *self.far) if begin <= self.position[node] < end]
                known = (node for node in early if self.position[node] < self.since)
                yield from (node for node in known if at in memory_written(node))
            nodes = self.writes.get(at, ())
            first = bisect_left(nodes, begin, key=self.position.__getitem__)
            if first < len(nodes) and self.position[nodes[first]] < end:
                yield nodes[first]

    def first(self, begin: int, end: float, read: Iterable[Node]) -> tuple[Node, Node] | None:
        """The first write in [begin, end) to memory of a tensor in ``read``, and the last such tensor.

        Where there is no end, so does a backward that may write to it, from wherever its forward is.
        """
        if self.since == len(self.position):
            self.ask(next(node for node, at in self.position.items() if at == begin))
        held = {node: memory(node) for node in read}
        at = set().union(*held.values())
        changed, found = memory_written, list(self.writers(at, begin, end))
        if not found and end == math.inf:
            changed = memory_written_in_backward
            found = [node for node in self.with_backward(at) if not changed(node).isdisjoint(at)]
        if not found:
            return None
        writer = min(found, key=self.position.__getitem__)
        shared = changed(writer)
        return writer, [node for node, own in held.items() if not own.isdisjoint(shared) or len(held) == 1][-1]

    def with_backward(self, read: set[int]) -> Iterator[Node]:
        """The nodes that are given some memory, and that may have a backward of somebody's own."""
        if self.special:
            for at in read:
                yield from (node for node in self.given.get(at, ()) if node in self.special)

    def between(self, begin: Node, end: Node, read: Iterable[Node]) -> str | None:
        """A sentence if a tensor that shares memory with ``read`` is written in [begin, end)."""
        found = self.first(self.position[begin], self.position[end], read)
        return found and f"{name_of(found[0])} at {where(found[0])} changes {found[1].name} in place before the loss"

    def anywhere_after(self, begin: Node, read: Iterable[Node]) -> str | None:
        found = self.first(self.position[begin], math.inf, read)
        if found:
            return f"{name_of(found[0])} at {where(found[0])} changes {found[1].name} in place"
        behind = (Mutations(call.graph).anywhere_after(call.next, read) for call in self.calls)
        return next(filter(None, behind), None)


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
