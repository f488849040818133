"""What stands where in a graph that is being edited: writes, grad modes, autocast regions, by the order of nodes.

Found once and then looked up, so that a question about one node costs no walk over the graph. Nodes compare by their
place (``a < b``: a is run before b), also those made or moved since. This file knows no heads.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator

import torch
from torch.fx import Graph, Node

from fusedhead.compat import enter_autocast, exit_autocast, set_grad_enabled
from fusedhead.graph.effects import writes

Regions = tuple[Node, ...]


class Places:
    """``recorded``: whether gradients are recorded at a node. ``autocast``: the regions it is in, outermost first.

    What writes, and where modes change, must not be moved; nodes that write may be erased, but not made.
    """

    def __init__(self, graph: Graph, enabled: bool | None = None) -> None:
        self.unasked = list(graph.nodes)  # in order: the beginning of the graph, which nobody has asked about yet
        self.writers: list[Node] = []  # what writes in the rest of it
        self.recorded = recorded(graph, enabled)
        self.autocast = autocast(graph)

    def ask(self, begin: Node) -> None:
        """Find out what writes from ``begin`` on."""
        found = []
        while self.unasked and (self.unasked[-1]._erased or not before(self.unasked[-1], begin)):
            node = self.unasked.pop()
            if not node._erased and writes(node):
                found.append(node)
        self.writers[:0] = reversed(found)

    def writes(self, begin: Node, end: Node) -> Iterator[Node]:
        """The nodes that write, from ``begin`` on and before ``end``."""
        self.ask(begin)
        for node in self.writers[bisect_left(self.writers, begin) :]:  # type: ignore[type-var]
            if not before(node, end):
                return
            if not node._erased:
                yield node


def before(a: Node, b: Node) -> bool:
    """Whether a node is run before another."""
    return bool(a < b)  # type: ignore[operator]


def recorded(graph: Graph, enabled: bool | None = None) -> Callable[[Node], bool]:
    """Whether gradients are recorded at a node; ``enabled`` where the graph begins, by default as it is here."""
    first = torch.is_grad_enabled() if enabled is None else enabled
    toggles = list(graph.find_nodes(op="call_function", target=set_grad_enabled))

    def at(node: Node) -> bool:
        past = bisect_right(toggles, node)  # type: ignore[type-var]
        return bool(toggles[past - 1].args[0]) if past else first

    return at


def autocast(graph: Graph) -> Callable[[Node], Regions]:
    """The autocast regions that a node stands in, outermost first, by the nodes that enter them."""
    ends = [n for t in (enter_autocast, exit_autocast) for n in graph.find_nodes(op="call_function", target=t)]
    ends.sort()  # type: ignore[call-overload]
    inside: list[Regions] = [()]
    for node in ends:
        if node.target is enter_autocast:
            inside.append((*inside[-1], node))
        else:
            inside.append(tuple(region for region in inside[-1] if region is not node.args[0]))
    return lambda node: inside[bisect_right(ends, node)]  # type: ignore[type-var]
