"""The modes that each node of a graph is run in: whether gradients are recorded, and under which autocast."""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

from fusedhead.read import name_of


def grad_modes(graph: Graph, enabled: bool | None = None) -> dict[Node, bool]:
    """Whether gradients are recorded at each node; ``enabled`` where the graph begins, by default as it is here."""
    enabled, modes = torch.is_grad_enabled() if enabled is None else enabled, {}
    for node in graph.nodes:
        if node.op == "call_function" and name_of(node) == "_set_grad_enabled":
            enabled = bool(node.args[0])
        modes[node] = enabled
    return modes


def autocasts(graph: Graph) -> dict[Node, tuple[Node, ...]]:
    """The autocast regions that each node stands in, outermost first, by the nodes that enter them."""
    inside: tuple[Node, ...] = ()
    found = {}
    for node in graph.nodes:
        if name_of(node) == "_enter_autocast":
            inside = (*inside, node)
        elif name_of(node) == "_exit_autocast":
            inside = tuple(region for region in inside if region is not node.args[0])
        found[node] = inside
    return found
