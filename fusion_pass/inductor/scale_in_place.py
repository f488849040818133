"""A pass on Inductor's backward graph: scales saved gradients in place.

`head_loss` saves dH and dW of a unit upstream gradient for the backward, which multiplies them by the upstream
gradient. Out of place this allocates a second dW and reads and writes both. A saved tensor that AOTAutograd calls
*donated* (no input, no output, no other view) dies in this graph, so that the product may overwrite it. The kernel
reads the factor on the device and returns at once where it is 1. A tensor that is not provably donated is scaled out of
place.
"""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

import fusedhead.lowering.scale  # noqa: F401  registers the ops
from fusedhead.compat import TracingContext


def donated_inputs(graph: Graph) -> set[Node]:
    """The placeholders of a backward graph whose memory the graph may overwrite."""
    context = TracingContext.try_get()
    indices = getattr(context.fw_metadata, "bw_donated_idxs", None) if context is not None else None
    saved = [node for node in graph.nodes if node.op == "placeholder"]
    return {saved[i] for i in indices or () if i < len(saved)}


def scale_in_place(graph: Graph) -> None:
    """Replace ``scale(x, g)`` of donated x without another user by x, and add one ``scale_(xs, g)`` for each g."""
    products = graph.find_nodes(op="call_function", target=torch.ops.fusedhead.scale.default)
    if not products:
        return
    donated = donated_inputs(graph)
    together: dict[Node, list[tuple[Node, Node]]] = {}
    for product in products:
        x, g = product.args
        if x in donated and len(x.users) == 1:
            together.setdefault(g, []).append((product, x))
    for g, same in together.items():
        with graph.inserting_before(same[0][0]):
            graph.call_function(torch.ops.fusedhead.scale_.default, ([x for _, x in same], g))
        for product, x in same:
            product.replace_all_uses_with(x)
            graph.erase_node(product)
