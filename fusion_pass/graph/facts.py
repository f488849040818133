"""Facts of a whole graph: grad modes, autocast regions, the memory that nodes write to, their order and their names.

`GraphFacts` is made once for a graph, computes lazily and is passed from pass to pass. Grad modes, autocast regions and
`writers` are live: they cover nodes that were created or moved since, by the graph's current order (``a < b``: a runs
before b). `position`, `named`, `write_between` and `write_after` describe the graph at the last `refresh`.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import cached_property
from typing import NamedTuple

import torch
from torch.fx import Graph, Node

from fusedhead.compat import HigherOrderOperator, enter_autocast, exit_autocast, set_grad_enabled
from fusedhead.graph.aliases import storages
from fusedhead.graph.effects import memory_written, memory_written_in_backward, reaches_far, writes
from fusedhead.graph.nodes import name_of

Regions = tuple[Node, ...]  # the nodes that enter autocast regions, outermost first


class Write(NamedTuple):
    """A node that writes to the memory of a tensor."""

    writer: Node
    tensor: Node


class GraphFacts:
    """The facts of one graph.

    ``grad``: whether gradients are recorded where the graph begins; None: the current mode. ``calls``: the nodes of
    other graphs that run this one; what runs after them can write to its tensors.
    """

    def __init__(self, graph: Graph, grad: bool | None = None, calls: Collection[Node] = ()) -> None:
        self.graph, self.calls = graph, calls
        self.grad = torch.is_grad_enabled() if grad is None else grad
        self.kept = False

    def refresh(self) -> None:
        """Drop all cached facts after the graph was edited. Does nothing after `keep`."""
        if not self.kept:
            for fact in ("grad_mode", "autocast", "live", "position", "index", "by_name"):
                self.__dict__.pop(fact, None)

    def keep(self, since: Node) -> None:
        """Freeze the facts before the rewrite: `position` and writes keep describing the graph as it is now.

        The writes of nodes from ``since`` on are computed now, before these are edited. Earlier nodes, a model's
        layers, are asked later and only where they take the memory in question.
        """
        self.refresh()
        self.index.ask(since)
        self.kept = True

    @cached_property
    def grad_mode(self) -> Callable[[Node], bool]:
        """Whether gradients are recorded at a node."""
        toggles = list(self.graph.find_nodes(op="call_function", target=set_grad_enabled))

        def at(node: Node) -> bool:
            past = bisect_right(toggles, node) if toggles else 0  # type: ignore[type-var]
            return bool(toggles[past - 1].args[0]) if past else self.grad

        return at

    @cached_property
    def autocast(self) -> Callable[[Node], Regions]:
        """The autocast regions around a node."""
        ends = [
            node
            for target in (enter_autocast, exit_autocast)
            for node in self.graph.find_nodes(op="call_function", target=target)
        ]
        ends.sort()  # type: ignore[call-overload]
        inside: list[Regions] = [()]
        for node in ends:
            if node.target is enter_autocast:
                inside.append((*inside[-1], node))
            else:
                inside.append(tuple(region for region in inside[-1] if region is not node.args[0]))
        return lambda node: inside[bisect_right(ends, node) if ends else 0]  # type: ignore[type-var]

    @cached_property
    def by_name(self) -> dict[str, list[Node]]:
        """The calls of the graph by the name of their op, each list in order."""
        calls: dict[str, list[Node]] = {}
        for node in self.graph.nodes:
            if name := name_of(node):
                calls.setdefault(name, []).append(node)
        return calls

    def named(self, names: Iterable[str]) -> list[Node]:
        """The calls of ops with these names, in order. Passes look here first, so that a graph is read once for all."""
        return sorted(node for name in names for node in self.by_name.get(name, ()))  # type: ignore[type-var]

    @property
    def data_views(self) -> list[Node]:
        """The nodes ``x.data``. A write through one changes x, and autograd does not see it."""
        return self.named(["_get_data_attr"])

    @cached_property
    def live(self) -> LiveWrites:
        return LiveWrites(self.graph)

    def writers(self, begin: Node, end: Node) -> Iterator[Node]:
        """The nodes that write in [begin, end), in the graph's current order."""
        return self.live.writers(begin, end)

    @cached_property
    def position(self) -> dict[Node, int]:
        """The index of each node at the last `refresh`."""
        return {node: place for place, node in enumerate(self.graph.nodes)}

    @cached_property
    def index(self) -> WriteIndex:
        return WriteIndex(self.position, self.live)

    def write_between(self, begin: Node, end: Node, read: Iterable[Node]) -> Write | None:
        """The first write in [begin, end) to memory of a tensor in ``read``."""
        return self.index.first(self.position[begin], self.position[end], read)

    def write_after(self, begin: Node, read: Iterable[Node]) -> Write | None:
        """The first write from ``begin`` on, or after a call of this graph, to memory of a tensor in ``read``."""
        write = self.index.first(self.position[begin], math.inf, read)
        if write is not None:
            return write
        later = (GraphFacts(call.graph).write_after(call.next, read) for call in self.calls)
        return next(filter(None, later), None)


def before(a: Node, b: Node) -> bool:
    """Whether a node runs before another."""
    return bool(a < b)  # type: ignore[operator]


class LiveWrites:
    """The writing nodes of a graph, computed from the end backwards. Nodes may be erased afterwards, not created or
    moved.
    """

    def __init__(self, graph: Graph) -> None:
        self.unasked = list(graph.nodes)  # the beginning of the graph, not computed yet
        self.known: list[Node] = []  # the writing nodes of the rest, in order

    def ask(self, begin: Node) -> None:
        """Compute the writing nodes from ``begin`` on."""
        writers = []
        while self.unasked and (self.unasked[-1]._erased or not before(self.unasked[-1], begin)):
            node = self.unasked.pop()
            if not node._erased and writes(node):
                writers.append(node)
        self.known[:0] = reversed(writers)

    def writers(self, begin: Node, end: Node) -> Iterator[Node]:
        """The nodes that write in [begin, end)."""
        self.ask(begin)
        for node in self.known[bisect_left(self.known, begin) :]:  # type: ignore[type-var]
            if not before(node, end):
                return
            if not node._erased:
                yield node


class WriteIndex:
    """The writes of a graph at one time, by memory and by the index of its nodes."""

    def __init__(self, position: dict[Node, int], live: LiveWrites) -> None:
        self.position, self.live = position, live
        self.since = len(position)  # from here on all writes are in ``written``
        self.written: dict[int, list[Node]] = {}  # memory -> the nodes that write there, in order
        self.readers: dict[int, list[Node]] = {}  # memory -> the nodes that take it as an argument, in order
        self.far: list[Node] = []  # nodes that may write to memory of no argument
        self.own_backward: set[Node] = set()  # nodes that may have a backward of user code
        memories = {node: storages(node) for node in position}
        for node in position:
            if node.op.startswith("call_"):
                for at in set().union(*map(memories.__getitem__, node.all_input_nodes)):
                    self.readers.setdefault(at, []).append(node)
                far = reaches_far(node)
                if far:
                    self.far.append(node)
                if far or isinstance(node.target, HigherOrderOperator):
                    self.own_backward.add(node)

    def ask(self, since: Node) -> None:
        """Compute the writes from ``since`` on, once."""
        self.since = self.position[since]
        self.live.ask(since)
        for node in self.live.known:
            for at in memory_written(node):
                self.written.setdefault(at, []).append(node)

    def writers(self, memories: set[int], begin: int, end: float) -> Iterator[Node]:
        """The nodes in [begin, end) that write to some memory, the first one for each storage."""
        for at in memories:
            if begin < self.since:
                candidates = (*self.readers.get(at, ()), *self.far)
                unasked = [node for node in candidates if begin <= self.position[node] < min(end, self.since)]
                yield from (node for node in unasked if at in memory_written(node))
            nodes = self.written.get(at, ())
            first = bisect_left(nodes, begin, key=self.position.__getitem__)
            if first < len(nodes) and self.position[nodes[first]] < end:
                yield nodes[first]

    def first(self, begin: int, end: float, read: Iterable[Node]) -> Write | None:
        """The first write in [begin, end) to memory of a tensor in ``read``, with the last such tensor.

        Without an end, a backward that may write to it counts too, wherever its forward is.
        """
        if self.since == len(self.position):
            self.ask(next(node for node, place in self.position.items() if place == begin))
        memories = {node: storages(node) for node in read}
        at = set().union(*memories.values())
        changed, writers = memory_written, list(self.writers(at, begin, end))
        if not writers and end == math.inf:
            changed = memory_written_in_backward
            writers = [node for node in self.with_own_backward(at) if not changed(node).isdisjoint(at)]
        if not writers:
            return None
        writer = min(writers, key=self.position.__getitem__)
        shared = changed(writer)
        tensors = [node for node, storages in memories.items() if not storages.isdisjoint(shared) or len(memories) == 1]
        return Write(writer, tensors[-1])

    def with_own_backward(self, memories: set[int]) -> Iterator[Node]:
        """The nodes that take some memory as an argument and may have a backward of user code."""
        if self.own_backward:
            for at in memories:
                yield from (node for node in self.readers.get(at, ()) if node in self.own_backward)
