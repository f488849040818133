"""The sweep of a head with a sharded vocabulary: this rank's rows, and the facts that all ranks must agree on.

The operands arrive as those of the whole head. The weight and vectors that stand for the rows of all ranks become this
rank's part, and other vectors along the classes are sliced. Labels stay those of the whole vocabulary: the op shifts
them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.fx import Node

import fusedhead.lowering.shard_loss  # noqa: F401  registers torch.ops.fusedhead
from fusedhead.analysis.reasons import NotInForward
from fusedhead.graph.dtensors import PRODUCT, SWEPT
from fusedhead.graph.nodes import fake
from fusedhead.graph.reasons import Refusal, refuse
from fusedhead.ir.builder import Emit, named
from fusedhead.ir.logits import Logits
from fusedhead.ir.shards import whole_vocab_of
from fusedhead.kernels.torch_engine.product_dtypes import product_dtype
from fusedhead.lowering.engines import engine_for
from fusedhead.lowering.shards import group_of
from fusedhead.rewrite import recipients
from fusedhead.rewrite.loss_tail import needs_of
from fusedhead.rewrite.sweeps import Batch

aten = torch.ops.aten
WHOLE = torch.ops.fusedhead.whole_vocab.default
# ops that leave every entry of a vector at its place
SAME_PLACE = frozenset({aten.to.dtype, aten.detach.default, aten.reshape.default})


def in_shards(batch: Batch) -> bool:
    return whole_vocab_of(batch[0].logits.head.weight) is not None


def sweep_call(emit: Emit, batch: Batch, operands: Sequence[Node], text: str, memory: int) -> Node:
    """The ``shard_stats`` call that replaces a ``head_stats`` on ``operands``: h, w, y, cols, rows, u."""
    whole = whole_vocab_of(batch[0].logits.head.weight)
    assert whole is not None
    _, start, vocab, group, reduce, own_labels = whole.args
    h, w, y, cols, rows, u = operands
    w = own_rows(emit, w, whole)
    count = fake(w).shape[0]
    if cols.target is aten.stack.default:
        vectors: Any = cols.args[0]
        each = [own_rows(emit, vector, whole) for vector in vectors]
        cols = emit(aten.stack.default, each)
    else:
        cols = emit(aten.new_empty.default, h, [0, count], dtype=torch.float32)
    if fake(u).numel():
        u = own_rows(emit, u, whole)
    want = ",".join(batch[0].want)
    op = torch.ops.fusedhead.shard_stats.default
    place = (start, vocab, group, "wide" if reduce else "", own_labels)
    takes = {} if reduce else recipients.to_scatter(emit, h)
    call = named(emit(op, h, w, y, cols, rows, u, text, want, memory, *place, **takes), "head")
    steps = [facts_of(group.logits) for group in batch]
    sizes = [fake(h).shape[1], fake(h).dtype, fake(y).shape[1], fake(cols).shape[0], fake(rows).shape[0]]
    call.meta[SWEPT] = (group, whole.meta[PRODUCT], repr((steps, text, want, vocab, *sizes, *place[3:])))
    return call


def not_in_one_sweep(call: Node) -> Refusal | None:
    """Why the gradients of a ``shard_stats`` are not computed in its sweep, or None; the same answer on all ranks."""
    vocab: Any = call.args[10]
    ranks = dist.get_world_size(group_of(str(call.args[11])))
    if -(-vocab // ranks) * (ranks - 1) >= vocab:
        return refuse(NotInForward.NO_CLASS, ranks=ranks, vocab=vocab)
    return refuse(NotInForward.SHARDS_OF_ROWS) if needs_of(call)[3] else None


def loss_call(emit: Emit, call: Node, coefficients: Sequence[Node]) -> Node:
    """The ``shard_loss`` call that replaces a ``shard_stats``. Its gradients are summed over the ranks in the backward.

    Only there is the upstream gradient known, which differs by rank where each has a loss of gathered logits.
    """
    h, needs = call.args[0], needs_of(call)
    text, want, memory, first, vocab, group, reduce, own_labels = call.args[6:14]
    takes = dict(call.kwargs)
    if reduce and needs[0]:
        takes |= recipients.to_sum(emit, h, group)  # type: ignore[arg-type]
    op = torch.ops.fusedhead.shard_loss.default
    loss = emit(
        op, *call.args[:6], *coefficients, text, want, memory, *needs, first, vocab, group, "", own_labels, **takes
    )
    of, product, facts = call.meta[SWEPT]
    value = fake(h)  # type: ignore[arg-type]
    engine = engine_for(value.dtype, value.device.type).name
    planned = (needs, memory, engine, product_dtype(value.dtype, value.device.type))  # all ranks in equal windows
    loss.meta[SWEPT] = (of, product, f"{facts} {planned}")
    return loss


def own_rows(emit: Emit, node: Node, whole: Node) -> Node:
    """This rank's part of a tensor along the classes."""
    rows = from_own(emit, node)
    if rows is not None:
        return rows
    start, count = int(whole.args[1]), fake(whole.args[0]).shape[0]  # type: ignore[arg-type]
    return emit(aten.slice.Tensor, node, 0, start, start + count)


def from_own(emit: Emit, node: Node) -> Node | None:
    """The node recomputed from this rank's part, where it is made of a tensor that stands for the rows of all ranks."""
    if node.target is WHOLE:
        return node.args[0]  # type: ignore[return-value]
    if node.target not in SAME_PLACE or (node.target is aten.reshape.default and fake(node.args[0]).ndim != 1):  # type: ignore[arg-type]
        return None
    below = from_own(emit, node.args[0])  # type: ignore[arg-type]
    return None if below is None else emit(node.target, below, *node.args[1:], **node.kwargs)


def facts_of(logits: Logits) -> list[str]:
    """A text of the steps on the rows, equal on two ranks where the steps are equal."""
    return [f"{step.op} {step.args}" for step in logits.row_steps]
