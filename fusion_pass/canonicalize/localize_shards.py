"""Localize shards: rewrite a tensor-parallel head, a product of DTensors, on plain tensors of the whole vocabulary.

    h = from_local(x, mesh, [Replicate()])                    x_plain = h.to_local()
    z = linear(h, w)            # w: Shard(0), z: Shard(-1)    z = linear(x_plain, whole_vocab(w.to_local()))
    loss = cross_entropy(z.redistribute(...).flatten(0, 1))    loss = cross_entropy(z.flatten(0, 1))

A DTensor is a global tensor, and an op on it is defined on the global tensor. The ops on the logits are therefore
rewritten on plain tensors of global size, where `redistribute`, `to_local` and `full_tensor` are identities; a gather
of [N, V] disappears with them. ``whole_vocab`` stands for the weight of all ranks and never runs: rules and decisions
see the global vocabulary, and the sweep that replaces the head runs on this rank's rows (`rewrite.shard_sweeps`). If a
head is not fused in the end, the driver starts again without this pass for it: the program's own DTensors stay, and the
reason is reported.

Hidden states whose tokens are sharded (`SequenceParallel`) are gathered by ``gather_tokens``, whose backward is a
reduce-scatter. Other hidden states keep their DTensor and are read by ``to_local``; the sweep sums their gradient.
`sharded_products` decides which products can be rewritten.
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
from fusedhead.graph.nodes import fake
from fusedhead.graph.op_names import PROJECTIONS
from fusedhead.graph.reasons import Escape, refuse
from fusedhead.graph.tracing import callee

aten = torch.ops.aten


def run(body: Body) -> None:
    """Rewrite tensor-parallel heads on plain tensors, except those that an earlier attempt excluded."""
    graph = body.graph
    products = [node for node in body.facts.named(PROJECTIONS) if is_dtensor(fake(node))]
    if not products:
        return
    with_loss = candidates(body.facts)
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
    """Find rewritten heads that are not fused, for the driver to run the passes again without them."""
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
    """Rewrites one product, and the ops on its result, on plain tensors."""

    def __init__(self, graph: Graph, modes: Mapping[Node, bool], shards: ShardedProduct) -> None:
        self.graph, self.modes, self.shards = graph, modes, shards
        self.plain: dict[Node, Any] = {}  # from a node of DTensors to the node of plain tensors that replaces it

    def put(self, like: Node, op: str, target: Any, args: tuple, kwargs: dict[str, Any] | None = None) -> Node:
        """A new node before ``like``, with its stack trace, computed in its grad mode, and with a fake value."""
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
        linear = self.typed(self.put(product, "call_function", F.linear, tuple(operands)), product)
        linear.meta[PRODUCT] = product.name
        return linear

    def whole(self, local: Node) -> Node:
        """A node that stands for the rows of all ranks, given those of this rank."""
        axis = self.shards.axis
        if axis is None:
            return local
        first = piece(self.shards.vocab, axis)[0]
        args = (local, first, self.shards.vocab, axis.group, self.shards.tokens is None, self.shards.gathered)
        whole = self.put(self.shards.product, "call_function", torch.ops.fusedhead.whole_vocab.default, args)
        whole.meta[PRODUCT] = self.shards.product.name
        return whole

    def on_plain(self, node: Node) -> Any:
        if dtensors.placement_call(node) is not None:
            return self.plain[node.args[0]]  # type: ignore[index]

        def plain(source: Node) -> Any:
            if source not in self.plain and is_dtensor(fake(source)):
                return self.local(node, source)
            return self.plain.get(source, source)

        args, kwargs = map_arg((node.args, node.kwargs), plain)
        return self.typed(self.put(node, node.op, node.target, args, kwargs), node)

    def typed(self, node: Node, like: Node) -> Node:
        """Give a new node the dtype recorded for the node that it replaces, which may have run under autocast."""
        value = fake(node)
        if isinstance(value, Tensor) and isinstance(fake(like), Tensor) and value.dtype != fake(like).dtype:
            node.meta["example_value"] = value.to(fake(like).dtype)
        return node

    def as_dtensor(self, source: Node) -> Node:
        """A replicated DTensor of a plain result, for a user that stays as it is."""
        mesh, node = fake(source).device_mesh, mesh_of(source)
        with self.graph.inserting_before(source):
            if node is None:
                dtensor = self.graph.call_function(dtensors.replicating(mesh), (self.plain[source],))
            else:
                args = (self.plain[source], node, dtensors.on_every_rank(mesh))
                dtensor = self.graph.call_function(dtensors.from_local(), args, {"run_check": False})
        dtensor.meta.update(source.meta)  # with the DTensor that Dynamo recorded, which is the same value
        return dtensor
