"""Plans which products of DTensors are rewritten on plain tensors; `localize_shards` carries the plan out.

A `ShardedProduct` holds the operands of the product, the mesh dimension that its classes are sharded over, the nodes
after it that are rewritten on plain tensors, and the uses that keep a DTensor. A product that cannot be planned stays,
with a sentence about its shards.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch.fx import Node

from fusedhead.canonicalize.reasons import InShards
from fusedhead.compat import HigherOrderOperator, maybe_get_fake_mode, tree_leaves
from fusedhead.graph import dtensors
from fusedhead.graph.dtensors import (
    Axis,
    axis_of,
    is_dtensor,
    layout,
    piece,
    placement_call,
    replicated,
    same_mesh,
    shard_dim,
)
from fusedhead.graph.nodes import fake, name_of
from fusedhead.graph.reasons import Escape, Refusal, refuse

WEIGHT_IS_TRANSPOSED = {"linear": False, "matmul": True, "mm": True}


class Refused(Exception):
    """A product of DTensors is not read on plain tensors."""

    def __init__(self, why: Refusal) -> None:
        self.why = why
        super().__init__(why.sentence)


class ShardedProduct(NamedTuple):
    """A product of DTensors that can be read on plain ones."""

    product: Node
    hidden: Node  # its placement is Replicate or, over the tokens, Shard
    tokens: int | None  # the dimension over which the tokens of `hidden` are sharded, if they are
    weight: Node
    transposed: bool  # whether the weight is [D, V]
    bias: Node | None
    axis: Axis | None  # what the vocabulary is sharded over; None: every rank has all of it
    vocab: int
    converted: list[Node]  # nodes after the product to be rewritten on plain tensors, in order
    ends: list[tuple[Node, Node]]  # (user, converted node): uses that keep a DTensor
    gathered: bool  # whether the program gathers the logits as a plain tensor, which each rank may use differently


def kept(product: Node, why: Refusal) -> Refusal:
    """Why a product stays as it is, with the shape [V, D] and the placement of its weight."""
    tensors = [fake(node) for node in product.all_input_nodes if is_dtensor(fake(node))]
    value = tensors[1] if len(tensors) > 1 else tensors[0]
    turned = WEIGHT_IS_TRANSPOSED.get(name_of(product), False) and value.ndim == 2
    shape, placed = list(value.shape)[:: -1 if turned else 1], layout(value, turned)
    cut = [d for d, p in enumerate(value.placements) if shard_dim(p, value.ndim) is not None]
    axis = axis_of(value.device_mesh, cut[0]) if cut else None
    if axis is None or axis.name is None:
        ranks = axis.ranks if axis else value.device_mesh.size()
        return refuse(InShards.KEPT, shape=shape, placed=placed, ranks=ranks, why=why)
    return refuse(InShards.KEPT_ALONG, shape=shape, placed=placed, why=why, ranks=axis.ranks, name=axis.name)


def planned(product: Node, with_loss: set[Node]) -> ShardedProduct:
    """The plan of a product on plain tensors. Raises Escape or Refused."""
    if product not in with_loss:
        raise Escape(InShards.NO_LOSS)
    name = name_of(product)
    operands = [*product.args, *product.kwargs.values()]
    if name not in WEIGHT_IS_TRANSPOSED or len(operands) < 2:
        raise Escape(InShards.SPELLING, name=name)
    hidden, weight, bias = (*operands, None)[:3]
    if not all(isinstance(n, Node) and is_dtensor(fake(n)) for n in (hidden, weight, *([bias] if bias else []))):
        raise Escape(InShards.MIXED)
    assert isinstance(hidden, Node)
    assert isinstance(weight, Node)
    transposed, value = WEIGHT_IS_TRANSPOSED[name], fake(weight)
    if value.ndim != 2:
        raise Escape(InShards.WEIGHT_DIMENSIONS, ndim=value.ndim)
    axis = vocab_axis(value, 1 if transposed else 0)
    vocab = value.shape[1 if transposed else 0]
    if not isinstance(vocab, int):
        raise Escape(InShards.SYMBOLIC_VOCAB)
    if axis is not None:
        first, last = piece(vocab, axis)
        if local_size(value, 1 if transposed else 0) != last - first:
            raise Escape(InShards.ODD_PIECES)
    if bias is not None:
        vocab_axis(fake(bias), 0)  # type: ignore[arg-type]
    hidden, tokens = source_of(hidden, axis, value.device_mesh)
    converted, ends = followed(product)
    gathered = any(is_gathered(node, vocab) for node in converted)
    return ShardedProduct(product, hidden, tokens, weight, transposed, bias, axis, vocab, converted, ends, gathered)  # type: ignore[arg-type]


def is_gathered(node: Node, vocab: int) -> bool:
    """Whether a node turns logits that are DTensors into plain tensors."""
    # comparing a symbol would add a guard
    sizes = [size for size in getattr(fake(node), "shape", ()) if isinstance(size, int)]
    call = placement_call(node)
    return call is not None and call.name != "redistribute" and vocab in sizes


def vocab_axis(value: Any, vocab_dim: int) -> Axis | None:
    """The mesh dimension over which the classes of a weight or a bias are sharded; None: every rank has all of it."""
    dims = [d for d, p in enumerate(value.placements) if shard_dim(p, value.ndim) == vocab_dim]
    dims = [d for d in dims if value.device_mesh.size(d) > 1]  # a single rank has all of it
    if len(dims) > 1:
        raise Escape(InShards.SEVERAL_DIMENSIONS)
    if not replicated(value, dims[0] if dims else None):
        raise Escape(InShards.PARTIAL_SUM)
    return axis_of(value.device_mesh, dims[0]) if dims else None


def local_size(value: Any, dim: int) -> int:
    with maybe_get_fake_mode(value) or nullcontext(), torch.no_grad():  # type: ignore[attr-defined]
        return int(value.to_local().shape[dim])


def source_of(hidden: Node, axis: Axis | None, mesh: Any) -> tuple[Node, int | None]:
    """The DTensor behind hidden states, and the dimension over which its tokens are sharded."""
    value = fake(hidden)
    if not same_mesh(value.device_mesh, mesh):
        raise Escape(InShards.OTHER_MESH)
    if axis is not None:
        call = placement_call(hidden)
        for node in (hidden, hidden.args[0] if call is not None and call.name == "redistribute" else None):
            tokens = shards_of_tokens(node, axis)
            if tokens is not None:
                return node, tokens  # type: ignore[return-value]
    if not replicated(value):
        raise Escape(InShards.HIDDEN_STATES, placed=layout(value))
    return hidden, None


def shards_of_tokens(node: object, axis: Axis) -> int | None:
    """The dimension over which the tokens of hidden states are sharded equally, on the axis of the vocabulary."""
    if not isinstance(node, Node) or not is_dtensor(fake(node)) or not same_mesh(fake(node).device_mesh, axis.mesh):
        return None
    value = fake(node)
    dim = shard_dim(value.placements[axis.dim], value.ndim)
    if dim is None or dim == value.ndim - 1 or not replicated(value, axis.dim):
        return None
    size = value.shape[dim]
    return dim if isinstance(size, int) and size % axis.ranks == 0 else None


def followed(product: Node) -> tuple[list[Node], list[tuple[Node, Node]]]:
    """The nodes after a product that can be rewritten on plain tensors, and the uses that keep a DTensor.

    Raises Escape or Refused.
    """
    converted: dict[Node, None] = {product: None}
    plain: set[Node] = set()  # results that were plain already
    ends: list[tuple[Node, Node]] = []
    node = product.next
    while node.op != "root":
        read = [source for source in node.all_input_nodes if source in converted and source not in plain]
        if read:
            why = unreadable(node, converted)
            if not why:
                converted[node] = None
                if not is_dtensor(fake(node)) and not of_dtensors(node):
                    plain.add(node)
            else:
                ends += [(node, source) for source in read]
        node = node.next
    for user, source in ends:
        if not is_dtensor(fake(source)) or not replicated(fake(source)):
            why = unreadable(user, converted)
            if user.op == "output" or why is None:
                raise Escape(InShards.RETURNED, placed=layout(fake(source)) if is_dtensor(fake(source)) else "plain")
            raise Refused(replace(why, node=user).placed())
        if not dtensors.can_be_made(source):
            raise Escape(InShards.NO_MESH, name=source.name)
    return list(converted), ends


def mesh_of(node: Node) -> Node | None:
    return dtensors.mesh_node(node.graph, fake(node).device_mesh)


def of_dtensors(node: Node) -> bool:
    """Whether a node's value is several DTensors."""
    return isinstance(fake(node), (tuple, list)) and any(map(is_dtensor, tree_leaves(fake(node))))


def unreadable(node: Node, converted: Mapping[Node, None]) -> Refusal | None:
    """Why a node that reads the logits or a value of them cannot be rewritten on plain tensors, or None."""
    source = node.args[0] if node.args else None
    placed = layout(fake(source)) if isinstance(source, Node) and is_dtensor(fake(source)) else ""
    if node.op == "output":
        return refuse(InShards.RETURNED, placed=placed)
    call = placement_call(node)
    if call is not None and call.name == "redistribute":
        return None if is_dtensor(fake(node)) else refuse(InShards.NO_DTENSOR, name="redistribute")
    if call is not None:
        if call.kwargs.get("grad_placements") or call.args:
            return refuse(InShards.GRAD_PLACEMENTS, name=call.name)
        if call.name == "to_local" and not replicated(fake(source)):  # type: ignore[arg-type]
            return refuse(InShards.OWN_PART, placed=placed)
        return None
    unknown = isinstance(node.target, HigherOrderOperator) or dtensors.is_closure(node)
    if unknown or node.op not in ("call_function", "call_method"):
        return refuse(InShards.TAKES_SHARDS, name=name_of(node) or node.op)
    if name_of(node) == "dropout" or "wait" in name_of(node):
        return refuse(InShards.TAKES_SHARDS, name=name_of(node))
    unconverted = [n for n in node.all_input_nodes if n not in converted and is_dtensor(fake(n))]
    split = next((n for n in unconverted if not replicated(fake(n))), None)
    if split is not None:
        return refuse(InShards.MEETS, name=name_of(node), other=split.name, placed=layout(fake(split)))
    if not is_dtensor(fake(node)) and not of_dtensors(node) and not dtensors.is_number(fake(node)):
        return refuse(InShards.NO_DTENSOR, name=name_of(node))
    if is_dtensor(fake(node)) and any("Partial" in type(p).__name__ for p in fake(node).placements):
        return refuse(InShards.LEAVES_A_SUM, name=name_of(node), placed=layout(fake(node)))
    return None
