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
    COMPANIONS,
    DIFFERENTIABLE_STATS,
    LINEAR_STATS,
    LOSS_OUTPUTS,
    SAVED_STATS,
    STATS,
    Needs,
    OtherColumns,
    RowGrads,
    stat_dtype,
)
from fusedhead.lowering import fakes, ops, ranges, shards
from fusedhead.lowering.autograd import HEAD_LOSS, HEAD_OPERANDS, split_at
from fusedhead.lowering.checks import head_of, parse_stats
from fusedhead.lowering.engines import engine_for
from fusedhead.lowering.shard_merge import Part, gathered, gathered_parts, merged, own_upstream

GIVEN = (*LINEAR_STATS, *COMPANIONS)
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
    c = _of_this_rank(coefficients, here)
    if want & {"sum", "spread"} and c.sum is None:
        c = c._replace(sum=h.new_zeros(h.shape[0], dtype=stat_dtype(h.dtype)))
    each = -(-vocab // dist.get_world_size(group))
    row_scale = engine_for(h.dtype, h.device.type).row_scale_serves(head, c, needs)
    problem = ops._problem(
        head, needs, linear=True, row_scale=row_scale, explicit=not row_scale, sums=c.sum is not None
    )
    engine, windows = ops._chosen(problem._replace(vocab=each), memory, 0)
    even = each * (dist.get_world_size(group) - 1) < vocab  # every rank holds a column
    if not (even and any(needs) and engine.other_columns_serve(head, c, needs, windows)):
        return _two_sweeps(operands, coefficients, rest, want)
    with ops.without_autocast(h.device):
        got, grads = engine.head_loss(head, c, needs, windows, _other_columns(group))
    assert got.picked is not None
    picked = torch.where(here, got.picked, 0)
    weight = u.sum() if u.numel() else h.new_full((), float(w.shape[0]), dtype=stat_dtype(h.dtype))
    part = Part(weight, got.lse, got.lse_low, picked, got.sum, got.spread)
    parts, flags = gathered_parts(part, shards.wrong_label(y, vocab), group)
    shards.require_labels(flags, vocab)
    found = list(ops._gradients(grads, head))
    tie = h.new_full((), -0.0, dtype=stat_dtype(h.dtype)) if got.tie is None else got.tie
    return _results(h, want, merged(parts), found, reduce and (name, reduce), tie)


def _of_this_rank(coefficients: Sequence[Tensor], here: Tensor) -> RowGrads:
    """The coefficients as an engine takes them; a label of another rank's has none."""
    c_lse, c_picked, c_sum, c_square = (ops._none_if_empty(c) for c in coefficients)
    picked = None if c_picked is None else torch.where(here, c_picked, 0)
    return RowGrads(c_lse, picked, c_sum, square=c_square)


def _results(
    h: Tensor, want: frozenset[str], total: dict[str, Tensor], grads: list[Tensor], summing: Any, tie: Tensor
) -> tuple[Tensor, ...]:
    given = ops.with_companions(want)
    results = {name: ops._empty_if_absent(total.get(name) if name in given else None, h) for name in GIVEN}
    for at, need in ((0, True), (3, False)):
        if grads[at].numel() and summing:
            grads[at] = shards._summed(grads[at], summing[0], summing[1] if need else "wide")
    results |= zip(("dh", "dw", "dcols", "drows"), grads)
    results["tie"] = tie
    return tuple(results[name] for name in LOSS_OUTPUTS)


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
    c_lse, c_picked, c_sum, c_square = (ops._none_if_empty(c) for c in coefficients)
    if c_square is not None:
        slope = 2 * c_square * total["lse"]
        c_lse = slope if c_lse is None else c_lse + slope
    upstream: dict[str, Tensor | None] = dict.fromkeys(DIFFERENTIABLE_STATS)
    upstream |= {"lse": c_lse, "picked": c_picked, "sum": c_sum}
    own_upstream(upstream, {each: total[each] for each in SAVED_STATS}, dict(zip(SAVED_STATS, own)))
    absent = h.new_empty(0, dtype=stat_dtype(h.dtype))
    grads: list[Tensor] = [absent] * 4
    if any(needs):
        upward = [absent if g is None else g for g in upstream.values()]
        *grads, _ = shards._shard_stats_backward(*upward, *operands, *own, transform, memory, *needs, *place)
    return _results(h, want, total, grads, None, h.new_full((), -0.0, dtype=stat_dtype(h.dtype)))


def _fake(*args: Any) -> tuple[Tensor, ...]:
    return fakes.fake_head_loss(*args)


def _backward(ctx: Any, *upstream: Tensor | None) -> tuple:
    grads = HEAD_LOSS[1](ctx, *upstream)
    return *grads, *(None,) * (LOSS_INPUTS - len(grads))


torch.library.define("fusedhead::shard_loss", SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
_ranged = ranges.ranged("shard_loss", ranges.operands_named(SCHEMA), _shard_loss)
torch.library.impl("fusedhead::shard_loss", "default", _ranged)
torch.library.register_fake("fusedhead::shard_loss", _fake)
torch.library.register_autograd("fusedhead::shard_loss", _backward, setup_context=HEAD_LOSS[0])
