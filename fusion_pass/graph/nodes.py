"""Reading one node of the Dynamo graph as ATen: every spelling of an op becomes the same few overloads.

The node is traced alone, on its fake inputs, with ``make_fx(pre_dispatch=True)``: methods, operators, positional
arguments, ``.T`` and einops collapse to about thirty overloads, `cross_entropy` stays one op. This file knows
nothing of heads; it must not edit the graph it reads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from contextlib import nullcontext
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg

from fusedhead.compat import maybe_get_fake_mode, tree_flatten, tree_unflatten

aten = torch.ops.aten


def fake(node: Node) -> Any:
    """The fake value Dynamo recorded for a node, or None."""
    return node.meta.get("example_value")


def inputs(node: Node) -> list[Node]:
    """The nodes among a node's arguments, in order of appearance, once each."""
    return list(dict.fromkeys(node.all_input_nodes))


def callee(node: Node) -> Callable[..., Any]:
    """A function that runs the node on given arguments."""
    if node.op == "call_method":
        name = str(node.target)
        return lambda self, *args, **kwargs: getattr(self, name)(*args, **kwargs)
    assert callable(node.target)
    return node.target


def trace(node: Node) -> GraphModule:
    """The node as a graph of ATen ops, with one placeholder per entry of ``inputs(node)``.

    Autocast is off while tracing: where it acts, the recorded dtype of the node says so, not the ops.
    Raises whatever the node's own function raises on the fake values.
    """
    leaves, spec = tree_flatten((node.args, node.kwargs))
    sources = inputs(node)
    run = callee(node)

    def standalone(*values: Any) -> Any:
        given = dict(zip(sources, values))
        args, kwargs = tree_unflatten([map_arg(leaf, given.__getitem__) for leaf in leaves], spec)
        return run(*args, **kwargs)

    tensors = [v for v in map(fake, sources) if isinstance(v, torch.Tensor)]
    device = tensors[0].device.type if tensors else "cpu"
    mode = maybe_get_fake_mode(tensors[0]) if tensors else None
    with torch.autocast(device, enabled=False), torch.no_grad(), mode or nullcontext():
        return make_fx(standalone, pre_dispatch=True)(*map(fake, sources))


def form(node: Node) -> Hashable:
    """What a node does, whatever it does it to: its function and its constants. Raises TypeError: not known."""
    sources = inputs(node)
    leaves, spec = tree_flatten((node.args, node.kwargs))

    def of(leaf: Any) -> Hashable:
        if isinstance(leaf, Node):
            return "node", sources.index(leaf)
        if isinstance(leaf, slice):
            return "slice", of(leaf.start), of(leaf.stop), of(leaf.step)
        return type(leaf), leaf

    found = node.op, node.target, str(spec), *map(of, leaves)
    hash(found)
    return found


def kind(node: Node) -> Hashable:
    """What a node's trace depends on: its function, its constants, and what tensors it is given. None: not known."""
    try:
        found = form(node), *map(layout, map(fake, inputs(node)))
        hash(found)
        return found
    except (TypeError, RuntimeError, NotImplementedError):
        return None


def layout(value: Any) -> Hashable:
    """What tells fake tensors apart, but for their place in memory. Raises TypeError where it is not known."""
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
        raise TypeError
    sizes = *value.shape, *value.stride()
    if not all(isinstance(size, int) for size in sizes):
        raise TypeError
    return type(value), value.ndim, sizes, value.dtype, value.device, value.is_conj(), value.is_neg()


class Traces:
    """The traces of one graph's nodes. Nodes that do the same to tensors of the same kind, as in loops, share one."""

    def __init__(self) -> None:
        self.known: dict[Hashable, GraphModule] = {}

    def __call__(self, node: Node) -> GraphModule:
        known = kind(node)
        if known is None:
            return trace(node)
        if known not in self.known:
            self.known[known] = trace(node)
        return self.known[known]


def every_dimension(index: Any, ndim: int) -> list[Any]:
    """The entries of an index, with ``...`` and what is left out written as full slices."""
    entries = list(index) if isinstance(index, tuple) else [index]
    at = next((i for i, entry in enumerate(entries) if entry is Ellipsis), None)
    if at is not None:
        entries[at : at + 1] = [slice(None)] * (ndim - len(entries) + 1)
    return entries + [slice(None)] * (ndim - len(entries))


def hint(size: Any) -> int | None:
    """The number of this compilation, for a size that may be symbolic; None where only the data decide."""
    if isinstance(size, torch.SymInt):
        node: Any = size.node
        return int(node.hint) if node.has_hint() else None
    return int(size)


# The ops that stand for the attribute of a tensor in graphs of newer torch, where older ones hold a `getattr`.
ATTRIBUTES: dict[Any, str] = {aten.numpy_T: "T", aten.mT: "mT", aten.matrix_H: "H", aten.mH: "mH"}


def most(size: Any) -> float:
    """The largest number that a size may be: of a symbol the end of its range, infinite where only the data decide."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    try:
        return int(size.node.shape_env.bound_sympy(size.node.expr).upper)
    except Exception:  # unbounded, or not told
        return math.inf


def name_of(node: Node) -> str:
    """The bare name of the op a node calls, whatever its spelling; that of the attribute for ``x.T``.

    "" where a node calls no function: inputs of a graph, or of a body in it, may be called after any op.
    """
    if node.op == "call_method":
        return str(node.target)
    if node.op != "call_function":
        return ""
    packet: Any = getattr(node.target, "_overloadpacket", node.target)
    if packet is getattr and isinstance(node.args[1], str):
        return node.args[1]
    return ATTRIBUTES.get(packet) or str(getattr(packet, "__name__", packet))


def where(node: Node) -> str:
    """ "file.py:123" of the user's line that made a node, or its name where no line is known."""
    trace_lines = node.meta.get("stack_trace", "").strip().splitlines()
    for line in reversed(trace_lines):
        if line.strip().startswith("File "):
            path, _, rest = line.strip().removeprefix("File ").partition(", line ")
            return f"{path.strip(chr(34)).rsplit('/', 1)[-1]}:{rest.split(',')[0]}"
    return node.name
