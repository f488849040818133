"""The modes of every node of a graph at once, as `places` finds them by question: for graphs that are then edited."""

from __future__ import annotations

from torch.fx import Graph, Node

from fusedhead.graph.facts import Regions, autocast, recorded


def grad_modes(graph: Graph, enabled: bool | None = None) -> dict[Node, bool]:
    """Whether gradients are recorded at each node; ``enabled`` where the graph begins, by default as it is here."""
    at = recorded(graph, enabled)
    return {node: at(node) for node in graph.nodes}


def autocasts(graph: Graph) -> dict[Node, Regions]:
    """The autocast regions that each node stands in, outermost first, by the nodes that enter them."""
    at = autocast(graph)
    return {node: at(node) for node in graph.nodes}
