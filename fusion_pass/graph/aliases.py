"""Aliasing: the storages of the fake values of a graph's nodes tell which nodes share memory.

Dynamo ran every node once on fake tensors, in order, so that a view has the storage of what it views, and inputs
that overlap have one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

import fusedhead.lowering.shards  # noqa: F401  registers torch.ops.fusedhead.whole_vocab
from fusedhead.compat import FakeTensor, tree_leaves
from fusedhead.graph.nodes import fake

# types of values that hold no memory
NUMBERS = (
    int, float, complex, str, bytes, slice, range, type(None), type(...), torch.SymInt, torch.SymFloat, torch.SymBool,
    torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Generator, GraphModule,
)  # fmt: skip


def storage(value: Any) -> int | None:
    """A key that all views of one tensor share."""
    if isinstance(value, torch.UntypedStorage):
        return value._cdata
    if not isinstance(value, Tensor):
        return None
    try:
        return value.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return None


def value_of(node: Node) -> Any:
    """The value that Dynamo recorded for a node; for a ``get_attr``, the attribute."""
    value = fake(node)
    if value is None and node.op == "get_attr" and node.graph.owning_module is not None:
        value = node.graph.owning_module
        for name in str(node.target).split("."):
            value = getattr(value, name, None)
    return value


def plain_parts(value: Any) -> Iterator[Any]:
    """The leaves of a value; a tensor subclass gives its inner tensors."""
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor) and hasattr(type(leaf), "__tensor_flatten__") and storage(leaf) is None:
            for name in leaf.__tensor_flatten__()[0]:  # type: ignore[attr-defined]
                yield from plain_parts(getattr(leaf, name))
        else:
            yield leaf


def storages(node: Node) -> set[int]:
    """The storages that a node's value can reach.

    An unknown value (a handle, or the result of a node without a recorded value) can reach all memory of the node's
    arguments.
    """
    if node.target is torch.ops.fusedhead.whole_vocab.default:
        return storages(node.args[0])  # type: ignore[arg-type]  # it stands for a shard and its like on other ranks
    recorded = fake(node)
    if type(recorded) is FakeTensor:
        at = storage(recorded)
        return set() if at is None else {at}
    reached: set[int] = set()
    stack, seen = [node], {node}
    while stack:
        each = stack.pop()
        value, hidden = value_of(each), each.op.startswith("call_") and fake(each) is None
        for leaf in plain_parts(value):
            at = storage(leaf)
            if at is not None:
                reached.add(at)
            hidden |= at is None and not isinstance(leaf, NUMBERS)
        if hidden:
            fresh = [source for source in each.all_input_nodes if source not in seen]
            seen.update(fresh)
            stack += fresh
    return reached
