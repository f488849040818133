"""Traces one node of a Dynamo graph into ATen ops, so that all spellings of an op become the same few overloads.

The node is traced alone, on its fake inputs, with ``make_fx(pre_dispatch=True)``: methods, operators, positional
arguments, ``.T`` and einops collapse to about thirty overloads, and `cross_entropy` stays one op. The graph that holds
the node is not edited.
"""

from __future__ import annotations

from collections.abc import Hashable
from contextlib import nullcontext
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg

from fusedhead.compat import maybe_get_fake_mode, tree_flatten, tree_unflatten
from fusedhead.graph.nodes import callee, fake, inputs


def trace(node: Node) -> GraphModule:
    """The node as a graph of ATen ops, with one placeholder per entry of ``inputs(node)``.

    Autocast is off while tracing: its effect shows in the recorded dtype of the node, not in the ops.
    Raises whatever the node's own function raises on the fake values.
    """
    leaves, spec = tree_flatten((node.args, node.kwargs))
    sources = inputs(node)
    run = callee(node)

    def standalone(*values: Any) -> Any:
        values_of = dict(zip(sources, values))
        args, kwargs = tree_unflatten([map_arg(leaf, values_of.__getitem__) for leaf in leaves], spec)
        return run(*args, **kwargs)

    tensors = [v for v in map(fake, sources) if isinstance(v, torch.Tensor)]
    device = tensors[0].device.type if tensors else "cpu"
    mode = maybe_get_fake_mode(tensors[0]) if tensors else None
    with torch.autocast(device, enabled=False), torch.no_grad(), mode or nullcontext():
        return make_fx(standalone, pre_dispatch=True)(*map(fake, sources))


def call_key(node: Node) -> Hashable:
    """A key of a node's function and constants, without its operands. Raises TypeError where there is none."""
    sources = inputs(node)
    leaves, spec = tree_flatten((node.args, node.kwargs))

    def leaf_key(leaf: Any) -> Hashable:
        if isinstance(leaf, Node):
            return "node", sources.index(leaf)
        if isinstance(leaf, slice):
            return "slice", leaf_key(leaf.start), leaf_key(leaf.stop), leaf_key(leaf.step)
        return type(leaf), leaf

    key = node.op, node.target, str(spec), *map(leaf_key, leaves)
    hash(key)
    return key


def trace_key(node: Node) -> Hashable:
    """A key of what determines a node's trace: function, constants, kinds of operands; None where there is none."""
    try:
        key = call_key(node), *map(tensor_key, map(fake, inputs(node)))
        hash(key)
        return key
    except (TypeError, RuntimeError, NotImplementedError):
        return None


def tensor_key(value: Any) -> Hashable:
    """A key of a fake tensor's properties except its address. Raises TypeError where there is none."""
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
        raise TypeError
    sizes = *value.shape, *value.stride()
    if not all(isinstance(size, int) for size in sizes):
        raise TypeError
    return type(value), value.ndim, sizes, value.dtype, value.device, value.is_conj(), value.is_neg()


class Traces:
    """A cache of traces. Nodes that do the same to tensors of the same kind, as in loops, share a trace."""

    def __init__(self) -> None:
        self.known: dict[Hashable, GraphModule] = {}

    def __call__(self, node: Node) -> GraphModule:
        key = trace_key(node)
        if key is None:
            return trace(node)
        if key not in self.known:
            self.known[key] = trace(node)
        return self.known[key]
