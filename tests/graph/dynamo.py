"""The graphs that Dynamo hands a backend, for tests of what reads them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule, Node

from fusedhead.graph.nodes import name_of


def dynamo_graph(fn: Callable[..., Any], *args: Any, dynamic: bool | None = None) -> GraphModule:
    """The one graph of a function."""
    graphs: list[GraphModule] = []

    def backend(gm: GraphModule, example_inputs: Any) -> Callable[..., Any]:
        graphs.append(gm)
        return gm.forward

    torch.compiler.reset()
    torch.compile(fn, backend=backend, fullgraph=True, dynamic=dynamic)(*args)
    (graph,) = graphs
    return graph


def node_called(gm: GraphModule, name: str, nth: int = 0) -> Node:
    """The n-th node that calls an op of a name."""
    return [node for node in gm.graph.nodes if name_of(node) == name][nth]
