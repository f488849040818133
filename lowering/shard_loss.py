"""The op of a loss that is linear in the statistics of a head in shards: three products where the shards are even.

    shard_loss   one sweep of this rank's columns: the statistics of all columns, and gradients up to one scalar, as
                 `head_loss` gives them; dh is summed over the ranks

The factor of a row is c / Σ_v exp(z_v - level) over all columns. So the ranks gather the lse of a window of tokens when
it is swept, and its two products follow: 4 bytes a token and rank once, and what `shard_merge` sends once at the end.
All ranks plan for the largest shard, ceil(V / R) columns, so that all gather for the same windows.

Where the engine takes no such lse (row gradients, masks, another dtype), or a rank holds no column, the statistics are
gathered after a sweep of their own, and the gradients take a second one: four products.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fusedhead.kernels.contract import (
    DIFFERENTIABLE_STATS,
    LINEAR_STATS,
    SAVED_STATS,
    STATS,
    Needs,
    OtherColumns,
    stat_dtype,
)
from fusedhead.lowering import fakes, ops, ranges, shards
from fusedhead.lowering.autograd import HEAD_LOSS, HEAD_OPERANDS, split_at
from fusedhead.lowering.checks import head_of, parse_stats
from fusedhead.lowering.shard_merge import Part, gathered, gathered_parts, merged, own_upstream

COEFFICIENTS = len(LINEAR_STATS) + 1
LOSS_INPUTS = 21
_OPERANDS = ops.SCHEMAS["head_loss"].split(ops._WHOLE)[0]
SCHEMA = f"{_OPERANDS}, int first, int vocab, str group, str reduce) -> ({ops._LOSS})"


def _other_columns(group: dist.ProcessGroup) -> OtherColumns:
    """The lse of the columns of all other ranks, from a gather."""
    rank = dist.get_rank(group)

    def other_columns(tokens: slice, lse: Tensor) -> Tensor:
        of_all = gathered(lse, group)
        of_all[rank] = -torch.inf
        return of_all.logsumexp(0)

    return other_columns


def _shard_loss(*args: Any) -> tuple[Tensor, ...]:
    operands, coefficients, rest = split_at(args, HEAD_OPERANDS, COEFFICIENTS)
    transform, stats, memory, *needed, first, vocab, name, reduce = rest
    h, w, y, _, _, u = operands
    group, needs, want = shards.group_of(name), Needs(*needed), parse_stats(stats) | {"lse"}
    here, cell = shards.in_shard(y, first, w.shape[0])
    head = head_of((*operands[:2], cell, *operands[3:]), transform)
    c = ops._coefficients(coefficients, want, h)
    if c.picked is not None:  # a label of another rank's has no gradient here
        c = c._replace(picked=torch.where(here, c.picked, 0))
    each = -(-vocab // dist.get_world_size(group))
    engine, windows = ops._chosen(ops._loss_problem(head, needs, c)._replace(vocab=each), memory, 0)
    even = each * (dist.get_world_size(group) - 1) < vocab  # every rank holds a column
    if not (even and any(needs) and engine.other_columns_serve(head, c, needs, windows)):
        return _two_sweeps(operands, coefficients, rest, want)
    with ops.without_autocast(h.device):
        got, found = engine.head_loss(head, c, needs, windows, _other_columns(group))
    assert got.picked is not None
    picked = torch.where(here, got.picked, 0)
    part = Part(shards.class_weight(h, w, u), got.lse, got.lse_low, picked, got.sum, got.spread)
    parts, flags = gathered_parts(part, shards.wrong_label(y, vocab), group)
    shards.require_labels(flags, vocab)
    dh, dw, dcols, drows = ops._gradients(found, head)
    if needs.h and reduce:  # row vectors take two sweeps: drows is empty
        dh = shards._summed(dh, name, reduce)
    return ops._loss_outputs(h, want, merged(parts), (dh, dw, dcols, drows), got.tie)


def _two_sweeps(
    operands: Sequence[Tensor], coefficients: Sequence[Tensor], rest: Sequence[Any], want: frozenset[str]
) -> tuple[Tensor, ...]:
    """A sweep for the statistics, their merge, and a sweep for the gradients."""
    h = operands[0]
    transform, _, memory, *needs, first, vocab, name, reduce = rest
    place: Any = (first, vocab, name, reduce)
    tensors: Any = operands
    how: Any = (transform, ",".join(sorted(want)), memory)
    swept = shards._shard_stats(*(*tensors, *how, *place, False))
    whole, own, _ = split_at(swept, len(STATS), len(SAVED_STATS))
    total = dict(zip(STATS, whole))
    c = ops._coefficients(coefficients, frozenset(), h)
    slope = c.lse
    if c.square is not None:
        square = 2 * c.square * total["lse"]
        slope = square if c.lse is None else c.lse + square
    upstream: dict[str, Tensor | None] = dict.fromkeys(DIFFERENTIABLE_STATS)
    upstream |= {"lse": slope, "picked": c.picked, "sum": c.sum}
    own_upstream(upstream, {each: total[each] for each in SAVED_STATS}, dict(zip(SAVED_STATS, own)))
    absent = h.new_empty(0, dtype=stat_dtype(h.dtype))
    grads: list[Tensor] = [absent] * 4
    if any(needs):
        upward = [absent if g is None else g for g in upstream.values()]
        *grads, _ = shards._shard_stats_backward(*upward, *operands, *own, transform, memory, *needs, *place)
    return ops._loss_outputs(h, want, total, grads, None)


def _backward(ctx: Any, *upstream: Tensor | None) -> tuple:
    grads = HEAD_LOSS[1](ctx, *upstream)
    return *grads, *(None,) * (LOSS_INPUTS - len(grads))


torch.library.define("fusedhead::shard_loss", SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
_ranged = ranges.ranged("shard_loss", ranges.operands_named(SCHEMA), _shard_loss)
torch.library.impl("fusedhead::shard_loss", "default", _ranged)
torch.library.register_fake("fusedhead::shard_loss", fakes.fake_head_loss)
torch.library.register_autograd("fusedhead::shard_loss", _backward, setup_context=HEAD_LOSS[0])
