"""Accessors of a node of a Dynamo graph: its fake value, the op that it calls, its source line, its sizes."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import BuiltinFunctionType, ModuleType
from typing import Any

import torch
from torch.fx import Node

aten = torch.ops.aten
BUILTIN_NAMES: dict[Any, str] = {}  # names of C functions, which live as long as the process
LASTING = (ModuleType, type, type(None))  # the owner of a C function that is not a bound method
# Parts of a Dynamo source that Dynamo has added.
SOURCE_INTERNALS = frozenset({"self", "L", "G", "_modules", "_parameters", "_buffers", "_orig_mod"})


def fake(node: Node) -> Any:
    """The fake value Dynamo recorded for a node, or None."""
    return node.meta.get("example_value")


def inputs(node: Node) -> list[Node]:
    """The nodes among a node's arguments, each once, in order of appearance."""
    return list(dict.fromkeys(node.all_input_nodes))


def callee(node: Node) -> Callable[..., Any]:
    """A function that runs the node on given arguments."""
    if node.op == "call_method":
        name = str(node.target)
        return lambda self, *args, **kwargs: getattr(self, name)(*args, **kwargs)
    assert callable(node.target)
    return node.target


def every_dimension(index: Any, ndim: int) -> list[Any]:
    """The entries of an index, one for each dimension: ``...`` and missing entries become full slices."""
    entries = list(index) if isinstance(index, tuple) else [index]
    at = next((i for i, entry in enumerate(entries) if entry is Ellipsis), None)
    if at is not None:
        entries[at : at + 1] = [slice(None)] * (ndim - len(entries) + 1)
    return entries + [slice(None)] * (ndim - len(entries))


def hint(size: Any) -> int | None:
    """The hint of a size that may be symbolic; None for a data-dependent size."""
    if isinstance(size, torch.SymInt):
        node: Any = size.node
        return int(node.hint) if node.has_hint() else None
    return int(size)


# Ops that newer torch puts in the place of ``getattr`` on a tensor.
ATTRIBUTES: dict[Any, str] = {aten.numpy_T: "T", aten.mT: "mT", aten.matrix_H: "H", aten.mH: "mH"}


def most(size: Any) -> float:
    """The largest value of a size: for a symbol the end of its range, infinite for a data-dependent size."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    try:
        return int(size.node.shape_env.bound_sympy(size.node.expr).upper)
    except Exception:  # unbounded or unknown
        return math.inf


def name_of(node: Node) -> str:
    """The name of the op that a node calls, the same for all spellings; for ``x.T`` the name of the attribute.

    "" for a node that calls no function: the inputs of a graph or body may have the name of any op.
    """
    if node.op == "call_method":
        return str(node.target)
    if node.op != "call_function":
        return ""
    target: Any = node.target
    if target.__class__ is BuiltinFunctionType and target is not getattr:
        try:
            return BUILTIN_NAMES[target]
        except KeyError:
            if isinstance(target.__self__, LASTING):
                BUILTIN_NAMES[target] = target.__name__
            return str(target.__name__)
    packet: Any = getattr(node.target, "_overloadpacket", node.target)
    if packet is getattr and isinstance(node.args[1], str):
        return node.args[1]
    return ATTRIBUTES.get(packet) or str(getattr(packet, "__name__", packet))


def where(node: Node) -> str:
    """The user's line that made a node, as "file.py:123", or the node's name where no line is known."""
    trace_lines = node.meta.get("stack_trace", "").strip().splitlines()
    for line in reversed(trace_lines):
        if line.strip().startswith("File "):
            path, _, rest = line.strip().removeprefix("File ").partition(", line ")
            return f"{path.strip(chr(34)).rsplit('/', 1)[-1]}:{rest.split(',')[0]}"
    return node.name
