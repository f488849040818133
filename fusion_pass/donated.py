"""Scaling saved gradients in place: a pass over Inductor's backward graph.

`head_loss` saves dH and dW of a unit upstream gradient for the backward, which multiplies them by the upstream
gradient. Out of place that is a second dW and a pass over both. A saved tensor that AOTAutograd calls *donated* (no
input, no output, nobody else's view) dies in this graph, so the product may take its place, and a kernel that reads
the factor on the device costs nothing where it is 1. Whatever is not provably donated stays out of place.
"""

from __future__ import annotations

import torch
from torch._guards import TracingContext
from torch.fx import Graph, Node

import fusedhead.lowering.scale  # noqa: F401  registers the ops


def donated_inputs(graph: Graph) -> set[Node]:
    """The placeholders of a backward graph whose memory is this graph's to overwrite."""
    context = TracingContext.try_get()
    indices = getattr(context.fw_metadata, "bw_donated_idxs", None) if context is not None else None
    saved = [node for node in graph.nodes if node.op == "placeholder"]
    return {saved[i] for i in indices or () if i < len(saved)}


def scale_in_place(graph: Graph) -> None:
    """Turn ``scale(x, g)`` of a donated x with no other user into ``scale_(x, g)`` and x itself."""
    products = graph.find_nodes(op="call_function", target=torch.ops.fusedhead.scale.default)
    if not products:
        return
    donated = donated_inputs(graph)
    for product in products:
        x, g = product.args
        if x not in donated or len(x.users) != 1:
            continue
        with graph.inserting_before(product):
            graph.call_function(torch.ops.fusedhead.scale_.default, (x, g))
        product.replace_all_uses_with(x)
        graph.erase_node(product)
