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
`sharded_products` says which products can be read so. This file must not know how a head is fused.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.node import map_arg

import fusedhead.lowering.token_shards  # noqa: F401  registers torch.ops.fusedhead.whole_vocab and gather_tokens
from fusedhead.analysis.body import Body
from fusedhead.analysis.projections import candidates
from fusedhead.canonicalize.reasons import InShards
from fusedhead.canonicalize.sharded_products import (
    IDENTITIES,
    Refused,
    ShardedProduct,
    kept,
    mesh_of,
    of_dtensors,
    planned,
    vocab_axis,
)
from fusedhead.compat import maybe_get_fake_mode
from fusedhead.graph import dtensors
from fusedhead.graph.dtensors import KEPT_SHARDS, PRODUCT, is_dtensor, piece
from fusedhead.graph.nodes import fake, name_of
from fusedhead.graph.op_names import PROJECTIONS
from fusedhead.graph.reasons import Escape, refuse
from fusedhead.graph.tracing import callee

aten = torch.ops.aten


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
        except (Escape, Refused) as left:
            why = left.why if isinstance(left, Refused) else left.refusal
            product.meta[KEPT_SHARDS] = kept(product, why)
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


class Writer:
    """Writes one product, and what is made of it, on plain tensors."""

    def __init__(self, graph: Graph, modes: Mapping[Node, bool], shards: ShardedProduct) -> None:
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
        made_of = dtensors.replicated_local(value)
        return self.put(like, "call_method", "to_local", (value,)) if made_of is None else made_of

    def write(self) -> None:
        shards, product = self.shards, self.shards.product
        for node in shards.converted:
            self.plain[node] = self.projection() if node is product else self.on_plain(node)
        for user, source in shards.ends:
            user.replace_input_with(source, self.as_dtensor(source))
        for node in reversed(shards.converted):
            if not is_dtensor(fake(node)) and not of_dtensors(node):
                node.replace_all_uses_with(self.plain[node])
            sources = node.all_input_nodes
            self.graph.erase_node(node)
            for source in sources:
                if not source.users and dtensors.replicated_local(source) is not None:
                    self.graph.erase_node(source)

    def projection(self) -> Node:
        product, axis = self.shards.product, self.shards.axis
        hidden, weight = self.local(product, self.shards.hidden), self.local(product, self.shards.weight)
        if self.shards.tokens is not None and axis is not None:
            gather = torch.ops.fusedhead.gather_tokens.default
            both = self.put(product, "call_function", gather, (hidden, self.shards.tokens, axis.ranks, axis.group))
            hidden = self.put(product, "call_function", operator.getitem, (both, 0))
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
        args = (local, first, self.shards.vocab, axis.group, self.shards.tokens is None, self.shards.gathered)
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
