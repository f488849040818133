"""Tensor-parallel heads as plain ones: a product of DTensors over a sharded vocabulary, read on its whole logits.

    h = from_local(x, mesh, [Replicate()])                    x_plain = h.to_local()
    z = linear(h, w)            # w: Shard(0), z: Shard(-1)    z = linear(x_plain, whole_vocab(w.to_local()))
    loss = cross_entropy(z.redistribute(...).flatten(0, 1))    loss = cross_entropy(z.flatten(0, 1))

A DTensor is a global tensor, and an op on it means what it means on the whole: so what is made of the logits is
written on plain tensors, and `redistribute`, `to_local` and `full_tensor` become the identities that they are, with the
gather of [N, V] that they ask for. ``whole_vocab`` stands for the weight of all ranks and is never run: the rules read
a head of the global vocabulary, every decision is taken on global sizes, and the sweep that is then made runs on this
rank's rows (`rewrite.shard_sweeps`). Where a head is not fused after all the driver starts again without this pass: the
program's own DTensors stay, with the reason as a sentence about the shard.

Hidden states that the program gathers from shards of the tokens (`SequenceParallel`) are gathered by
``gather_tokens``, whose gradient is reduce-scattered; others keep their DTensor, and the sweep sums their gradient.
This file must not know how a head is fused.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.node import map_arg

import fusedhead.lowering.shards  # noqa: F401  registers torch.ops.fusedhead.whole_vocab and gather_tokens
from fusedhead.analysis.body import Body
from fusedhead.analysis.projections import candidates
from fusedhead.canonicalize.reasons import InShards
from fusedhead.compat import HigherOrderOperator, maybe_get_fake_mode, tree_leaves
from fusedhead.graph import dtensors
from fusedhead.graph.dtensors import (
    KEPT_SHARDS,
    Axis,
    axis_of,
    is_dtensor,
    layout,
    piece,
    replicated,
    same_mesh,
    shard_dim,
)
from fusedhead.graph.nodes import fake, name_of
from fusedhead.graph.op_names import PROJECTIONS
from fusedhead.graph.reasons import Escape, Refusal, refuse
from fusedhead.graph.tracing import callee

aten = torch.ops.aten
PRODUCT = "fusedhead_product"  # in the meta of a product: the name of the one of DTensors that it stands for
IDENTITIES = frozenset({"redistribute", "to_local", "full_tensor"})
WEIGHT_IS_TRANSPOSED = {"linear": False, "matmul": True, "mm": True}


class Refused(Exception):
    """A product of DTensors is not read on plain tensors."""

    def __init__(self, why: Refusal) -> None:
        self.why = why
        super().__init__(why.sentence)


class Shards(NamedTuple):
    """A product of DTensors that can be read on plain ones."""

    product: Node
    hidden: Node  # whose local part is taken: Replicate, or shards of the tokens
    tokens: int | None  # the dimension of the tokens that `hidden` lies in shards of
    weight: Node
    transposed: bool  # whether the weight is [D, V]
    bias: Node | None
    axis: Axis | None  # what the vocabulary lies in shards on; None: every rank has all of it
    vocab: int
    converted: list[Node]  # what is made of the product, in order, to be written on plain tensors
    ends: list[tuple[Node, Node]]  # (user, converted node): uses that keep a DTensor


def run(body: Body) -> None:
    """Write tensor-parallel heads on plain tensors, but for those that an earlier attempt has left."""
    graph = body.graph
    products = [node for node in graph.nodes if name_of(node) in PROJECTIONS and is_dtensor(fake(node))]
    if not products:
        return
    with_loss = candidates(graph)
    modes = {node: body.facts.grad_mode(node) for node in graph.nodes}
    for product in products:
        try:
            if product.name in body.excluded:
                raise Refused(body.excluded[product.name])
            shards = planned(product, with_loss)
            if not body.options.shards:
                raise Refused(refuse(InShards.NOT_ASKED))
        except (Escape, Refused) as left:
            why = left.why if isinstance(left, Refused) else left.refusal
            shape, placed, ranks = weight_in_words(product)
            product.meta[KEPT_SHARDS] = refuse(InShards.KEPT, shape=shape, placed=placed, ranks=ranks, why=why)
        else:
            Writer(graph, modes, shards).write()


def find_left(body: Body) -> None:
    """Find the heads that were written on plain tensors and are not fused: the passes then run without them."""
    for site, reason, _ in body.decisions:
        if reason and PRODUCT in site.head.node.meta:
            body.grown[site.head.node.meta[PRODUCT]] = reason
    noted = {finding.node: finding.reason for finding in body.findings}
    for node in body.graph.find_nodes(op="call_function", target=torch.ops.fusedhead.whole_vocab.default):
        if not node.users:
            body.graph.erase_node(node)
        elif node.meta[PRODUCT] not in body.grown:
            product = next((user for user in node.users if PRODUCT in user.meta), node)
            why = noted.get(product) or body.reading.no_rule.get(product)
            body.grown[node.meta[PRODUCT]] = why or refuse(InShards.NOT_READ)


def weight_in_words(product: Node) -> tuple[list[Any], str, str]:
    """The weight of a product as a tensor [V, D]: its shape, "Shard(0)", "the 2 ranks of mesh dimension 'tp'"."""
    tensors = [fake(node) for node in product.all_input_nodes if is_dtensor(fake(node))]
    value = tensors[1] if len(tensors) > 1 else tensors[0]
    turned = WEIGHT_IS_TRANSPOSED.get(name_of(product), False) and value.ndim == 2
    cut = [d for d, p in enumerate(value.placements) if shard_dim(p, value.ndim) is not None]
    over = axis_of(value.device_mesh, cut[0]) if cut else f"{value.device_mesh.size()} ranks"
    shape = list(value.shape)[:: -1 if turned else 1]
    return shape, layout(value, turned), str(over)


# ---- may it be read so? ---------------------------------------------------------------------------------------------


def planned(product: Node, with_loss: set[Node]) -> Shards:
    """How a product is read on plain tensors. Raises Escape or Refused."""
    if product not in with_loss:
        raise Escape(InShards.NO_LOSS)
    name = name_of(product)
    given = [*product.args, *product.kwargs.values()]
    if name not in WEIGHT_IS_TRANSPOSED or len(given) < 2:
        raise Escape(InShards.SPELLING, name=name)
    hidden, weight, bias = (*given, None)[:3]
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
    return Shards(product, hidden, tokens, weight, transposed, bias, axis, vocab, converted, ends)  # type: ignore[arg-type]


def vocab_axis(value: Any, vocab_dim: int) -> Axis | None:
    """The mesh dimension that a weight or a bias lies in shards of its classes on; None: it is whole on every rank."""
    found = [d for d, p in enumerate(value.placements) if shard_dim(p, value.ndim) == vocab_dim]
    found = [d for d in found if value.device_mesh.size(d) > 1]  # a single rank has all of it
    if len(found) > 1:
        raise Escape(InShards.SEVERAL_DIMENSIONS)
    if not replicated(value, found[0] if found else None):
        raise Escape(InShards.PARTIAL_SUM)
    return axis_of(value.device_mesh, found[0]) if found else None


def local_size(value: Any, dim: int) -> int:
    with maybe_get_fake_mode(value) or nullcontext(), torch.no_grad():  # type: ignore[attr-defined]
        return int(value.to_local().shape[dim])


def source_of(hidden: Node, axis: Axis | None, mesh: Any) -> tuple[Node, int | None]:
    """The DTensor that hidden states are taken of, and the dimension of the tokens that it lies in shards of."""
    value = fake(hidden)
    if not same_mesh(value.device_mesh, mesh):
        raise Escape(InShards.OTHER_MESH)
    if axis is not None:
        for node in (hidden, hidden.args[0] if name_of(hidden) == "redistribute" else None):
            tokens = shards_of_tokens(node, axis)
            if tokens is not None:
                return node, tokens  # type: ignore[return-value]
    if not replicated(value):
        raise Escape(InShards.HIDDEN_STATES, placed=layout(value))
    return hidden, None


def shards_of_tokens(node: object, axis: Axis) -> int | None:
    """The dimension of the tokens that hidden states lie in equal shards of, on the axis of the vocabulary."""
    if not isinstance(node, Node) or not is_dtensor(fake(node)) or not same_mesh(fake(node).device_mesh, axis.mesh):
        return None
    value = fake(node)
    dim = shard_dim(value.placements[axis.dim], value.ndim)
    if dim is None or dim == value.ndim - 1 or not replicated(value, axis.dim):
        return None
    size = value.shape[dim]
    return dim if isinstance(size, int) and size % axis.ranks == 0 else None


def followed(product: Node) -> tuple[list[Node], list[tuple[Node, Node]]]:
    """What is made of a product and can be written on plain tensors, and the uses that keep a DTensor.

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
        if mesh_of(source) is None:
            raise Escape(InShards.NO_MESH, name=source.name)
    return list(converted), ends


def mesh_of(node: Node) -> Node | None:
    return dtensors.mesh_node(node.graph, fake(node).device_mesh)


def of_dtensors(node: Node) -> bool:
    """Whether a node's value is several DTensors."""
    return isinstance(fake(node), (tuple, list)) and any(map(is_dtensor, tree_leaves(fake(node))))


def unreadable(node: Node, converted: Mapping[Node, None]) -> Refusal | None:
    """Why a node that takes the logits, or what was made of them, cannot be written on plain tensors, or None."""
    source = node.args[0] if node.args else None
    placed = layout(fake(source)) if isinstance(source, Node) and is_dtensor(fake(source)) else ""
    if node.op == "output":
        return refuse(InShards.RETURNED, placed=placed)
    if name_of(node) == "redistribute":
        return None if is_dtensor(fake(node)) else refuse(InShards.NO_DTENSOR, name="redistribute")
    if name_of(node) in ("to_local", "full_tensor"):
        if grad_placements(node):
            return refuse(InShards.GRAD_PLACEMENTS, name=name_of(node))
        if name_of(node) == "to_local" and not replicated(fake(source)):  # type: ignore[arg-type]
            return refuse(InShards.OWN_PART, placed=placed)
        return None
    if isinstance(node.target, HigherOrderOperator) or node.op not in ("call_function", "call_method"):
        return refuse(InShards.TAKES_SHARDS, name=name_of(node) or node.op)
    if name_of(node) == "dropout" or "wait" in name_of(node):
        return refuse(InShards.TAKES_SHARDS, name=name_of(node))
    others = [n for n in node.all_input_nodes if n not in converted and is_dtensor(fake(n))]
    split = next((n for n in others if not replicated(fake(n))), None)
    if split is not None:
        return refuse(InShards.MEETS, name=name_of(node), other=split.name, placed=layout(fake(split)))
    if not is_dtensor(fake(node)) and not of_dtensors(node) and not dtensors.is_number(fake(node)):
        return refuse(InShards.NO_DTENSOR, name=name_of(node))
    if is_dtensor(fake(node)) and any("Partial" in type(p).__name__ for p in fake(node).placements):
        return refuse(InShards.LEAVES_A_SUM, name=name_of(node), placed=layout(fake(node)))
    return None


def grad_placements(node: Node) -> object:
    return node.kwargs.get("grad_placements") or (node.args[1] if len(node.args) > 1 else None)


# ---- the edit -------------------------------------------------------------------------------------------------------


class Writer:
    """Writes one product, and what is made of it, on plain tensors."""

    def __init__(self, graph: Graph, modes: Mapping[Node, bool], shards: Shards) -> None:
        self.graph, self.modes, self.shards = graph, modes, shards
        self.plain: dict[Node, Any] = {}  # what stands for the value of a node of DTensors

    def put(self, like: Node, op: str, target: Any, args: tuple, kwargs: dict[str, Any] | None = None) -> Node:
        """A node before ``like``, with its line, its grad mode, and its fake value."""
        with self.graph.inserting_before(like):
            node = self.graph.create_node(op, target, args, kwargs or {})
        node.meta.update({k: v for k, v in like.meta.items() if k not in ("example_value", KEPT_SHARDS)})
        tensors = [v for v in map(fake, node.all_input_nodes) if isinstance(v, Tensor)]
        mode = maybe_get_fake_mode(tensors[0]) if tensors else None
        as_written = torch.autocast(tensors[0].device.type if tensors else "cpu", enabled=False)
        with torch.set_grad_enabled(self.modes[like]), mode or nullcontext(), as_written:
            values, keywords = map_arg((node.args, node.kwargs), fake)
            node.meta["example_value"] = callee(node)(*values, **keywords)
        return node

    def local(self, like: Node, value: Node) -> Node:
        return self.put(like, "call_method", "to_local", (value,))

    def write(self) -> None:
        shards, product = self.shards, self.shards.product
        for node in shards.converted:
            self.plain[node] = self.projection() if node is product else self.on_plain(node)
        for user, source in shards.ends:
            user.replace_input_with(source, self.as_dtensor(source))
        for node in reversed(shards.converted):
            if not is_dtensor(fake(node)) and not of_dtensors(node):
                node.replace_all_uses_with(self.plain[node])
            self.graph.erase_node(node)

    def projection(self) -> Node:
        product, axis = self.shards.product, self.shards.axis
        hidden, weight = self.local(product, self.shards.hidden), self.local(product, self.shards.weight)
        if self.shards.tokens is not None and axis is not None:
            gather = torch.ops.fusedhead.gather_tokens.default
            hidden = self.put(product, "call_function", gather, (hidden, self.shards.tokens, axis.ranks, axis.group))
        if self.shards.transposed:
            weight = self.put(product, "call_function", aten.t.default, (weight,))
        operands = [hidden, self.whole(weight)]
        if self.shards.bias is not None:
            bias = self.local(product, self.shards.bias)
            cut = vocab_axis(fake(self.shards.bias), 0) is not None
            operands.append(self.whole(bias) if cut else bias)
        made = self.typed(self.put(product, "call_function", F.linear, tuple(operands)), product)
        made.meta[PRODUCT] = product.name
        return made

    def whole(self, local: Node) -> Node:
        """What stands for the rows of all ranks."""
        axis = self.shards.axis
        if axis is None:
            return local
        first = piece(self.shards.vocab, axis)[0]
        args = (local, first, self.shards.vocab, axis.group, self.shards.tokens is None)
        made = self.put(self.shards.product, "call_function", torch.ops.fusedhead.whole_vocab.default, args)
        made.meta[PRODUCT] = self.shards.product.name
        return made

    def on_plain(self, node: Node) -> Any:
        if name_of(node) in IDENTITIES:
            return self.plain[node.args[0]]  # type: ignore[index]

        def plain(source: Node) -> Any:
            if source not in self.plain and is_dtensor(fake(source)):
                return self.local(node, source)
            return self.plain.get(source, source)

        args, kwargs = map_arg((node.args, node.kwargs), plain)
        return self.typed(self.put(node, node.op, node.target, args, kwargs), node)

    def typed(self, made: Node, like: Node) -> Node:
        """The recorded dtype of a node is that of the node that it stands for: autocast was on there, perhaps."""
        value = fake(made)
        if isinstance(value, Tensor) and isinstance(fake(like), Tensor) and value.dtype != fake(like).dtype:
            made.meta["example_value"] = value.to(fake(like).dtype)
        return made

    def as_dtensor(self, source: Node) -> Node:
        """A DTensor of a plain result that every rank has whole."""
        args = (self.plain[source], mesh_of(source), dtensors.on_every_rank(fake(source).device_mesh))
        with self.graph.inserting_before(source):
            made = self.graph.call_function(dtensors.from_local(), args, {"run_check": False})
        made.meta.update(source.meta)  # the value that Dynamo recorded: the same DTensor
        return made
