"""The op of a loss that is linear in the statistics of a head in shards: three products where the shards are even.

    shard_loss   one sweep of this rank's columns: the statistics of all columns, and gradients up to one scalar, as
                 `head_loss` gives them; dh is summed over the ranks, or with ``reduce`` "" left to a ``recipient``

The factor of a row is c / Σ_v exp(z_v - level) over all columns. So the ranks gather the statistics of a window of
tokens when it is swept, and its two products follow: what `shard_merge` sends at the end of a sweep without gradients,
in as many pieces as there are windows. All ranks plan for the largest shard, ceil(V / R) columns, so that all gather
for the same windows.

Where the engine takes no such lse (row gradients, masks, another dtype), or a rank holds no column, the statistics are
gathered after a sweep of their own, and the gradients take a second one: four products.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fusedhead.kernels.contract import (
    DIFFERENTIABLE_STATS,
    LINEAR_STATS,
    LOSS_OUTPUTS,
    SAVED_STATS,
    STATS,
    Head,
    Needs,
    RowGrads,
    RowStats,
    Windows,
    stat_dtype,
)
from fusedhead.kernels.torch_engine.blocks import row_dtype
from fusedhead.lowering import fakes, ops, ranges, shards
from fusedhead.lowering.autograd import HEAD_LOSS, HEAD_OPERANDS, split_at
from fusedhead.lowering.checks import head_of, parse_stats
from fusedhead.lowering.engines import Engine
from fusedhead.lowering.registration import register_op
from fusedhead.lowering.shard_labels import in_shard, labels_of_all, require_labels, wrong_label
from fusedhead.lowering.shard_merge import Part, gathered_parts, merged, own_upstream

COEFFICIENTS = len(LINEAR_STATS) + 1
_OPERANDS = ops.SCHEMAS["head_loss"].split(ops._WHOLE)[0]
_ENDS = "bool own_labels=False, Tensor? after=None, Tensor? recipient=None"
SCHEMA = f"{_OPERANDS}, int first, int vocab, str group, str reduce, {_ENDS}) -> ({ops._LOSS}, Tensor token)"
LOSS_INPUTS = 24


class Settings(NamedTuple):
    """The arguments of `shard_loss` that follow its tensors, by their names in the schema."""

    transform: str
    stats: str
    memory: int
    need_h: bool
    need_w: bool
    need_cols: bool
    need_rows: bool
    first: int
    vocab: int
    group: str
    reduce: str
    own_labels: bool = False
    after: Tensor | None = None
    recipient: Tensor | None = None

    @property
    def needs(self) -> Needs:
        return Needs(self.need_h, self.need_w, self.need_cols, self.need_rows)


class MergedWindows:
    """Gathers the statistics of one window of tokens after the other, for an engine that asks between its products."""

    def __init__(self, group: dist.ProcessGroup, weight: Tensor, inside: Tensor, flag: Tensor, vocab: int) -> None:
        self.group, self.weight, self.flag, self.vocab = group, weight, flag, vocab
        self.inside = inside  # [N, K], which labels are of this rank's columns
        self.rank, self.windows = dist.get_rank(group), list[Part]()

    def other_columns(self, tokens: slice, local: RowStats) -> Tensor:
        """The lse of the columns of all other ranks."""
        assert local.picked is not None
        picked = torch.where(self.inside[tokens], local.picked, 0)
        part = Part(self.weight, local.lse, local.lse_low, picked, local.sum, local.spread)
        parts, flags = gathered_parts(part, self.flag, self.group)
        if not self.windows:
            require_labels(flags, self.vocab)
        self.windows.append(parts)
        assert parts.lse is not None
        assert parts.lse_low is not None
        fine = row_dtype(local.lse.device.type)
        of_all = parts.lse.to(fine) + parts.lse_low.to(fine)
        of_all[self.rank] = -torch.inf
        return of_all.logsumexp(0)

    def total(self) -> dict[str, Tensor]:
        """The statistics of all columns."""
        first = self.windows[0]
        names = [name for name in ("lse", "lse_low", "picked", "sum", "spread") if getattr(first, name) is not None]
        columns = {name: torch.cat([getattr(part, name) for part in self.windows], 1) for name in names}
        return merged(Part(first.weight, **columns))


def _shard_loss(*args: Any) -> tuple[Tensor, ...]:
    operands, coefficients, rest = split_at(args, HEAD_OPERANDS, COEFFICIENTS)
    settings = Settings(*rest)
    h, want = operands[0], parse_stats(settings.stats) | {"lse"}
    c = ops._coefficients(coefficients, want, h)
    ranks = dist.get_world_size(shards.group_of(settings.group))
    each = -(-settings.vocab // ranks)
    if each * (ranks - 1) < settings.vocab and any(settings.needs) and len(h):  # every rank holds a column
        largest = _largest_shard(operands, settings, each)
        labels = largest.y.shape[1] * (ranks if settings.own_labels else 1)
        problem = ops._loss_problem(largest, settings.needs, c)._replace(labels=labels)
        engine, windows = ops._chosen(problem, settings.memory, 0)
        if engine.other_columns_serve(largest, c, settings.needs, windows):
            return _one_sweep(operands, c, settings, engine, windows)
    return _two_sweeps(operands, coefficients, settings, want)


def _largest_shard(operands: Sequence[Tensor], settings: Settings, each: int) -> Head:
    """A head of the sizes of the largest shard: what all ranks decide by. Its numbers are not read."""
    h, w, y, cols, rows, u = operands
    w, cols = w[:1].expand(each, -1), cols[:, :1].expand(-1, each)
    return head_of((h, w, torch.zeros_like(y), cols, rows, u[:1].expand(each) if len(u) else u), settings.transform)


def _one_sweep(
    operands: Sequence[Tensor], c: RowGrads, settings: Settings, engine: Engine, windows: Windows
) -> tuple[Tensor, ...]:
    h, w, y, cols, rows, u = operands
    group, needs, k = shards.group_of(settings.group), settings.needs, y.shape[1]
    columns, labels = slice(0, k), y
    if settings.own_labels and k:
        labels, rank = labels_of_all(y, group), dist.get_rank(group)
        columns = slice(rank * k, (rank + 1) * k)
    inside, cell = in_shard(labels, settings.first, w.shape[0])
    if c.picked is not None:  # the logits of other ranks' columns, and for other ranks' labels, have no gradient here
        picked = torch.zeros_like(cell, dtype=c.picked.dtype)
        picked[:, columns] = torch.where(inside[:, columns], c.picked, 0)
        c = c._replace(picked=picked)
    head = head_of((h, w, cell, cols, rows, u), settings.transform)
    merge = MergedWindows(group, shards.class_weight(h, w, u), inside, wrong_label(y, settings.vocab), settings.vocab)
    windows = windows._replace(dh=shards.part_dtype(h.dtype, settings.reduce))
    with ops.without_autocast(h.device):
        got, gradients = engine.head_loss(head, c, needs, windows, merge.other_columns)
    total = merge.total()
    total["picked"] = total["picked"][:, columns].contiguous()
    dh, dw, dcols, drows = ops._gradients(gradients, head)
    if needs.h and settings.reduce:  # row vectors take two sweeps: drows is empty
        dh = shards._summed(dh, h.dtype, settings.group, settings.reduce)
    return _outputs(h, settings, total, (dh, dw, dcols, drows), got.tie)


def _outputs(
    h: Tensor, settings: Settings, total: Mapping[str, Tensor | None], grads: Sequence[Tensor], tie: Tensor | None
) -> tuple[Tensor, ...]:
    want = parse_stats(settings.stats) | {"lse"}
    return *ops._loss_outputs(h, want, total, grads, tie), h.new_zeros(1, dtype=stat_dtype(h.dtype))


def _two_sweeps(
    operands: Sequence[Tensor], coefficients: Sequence[Tensor], settings: Settings, want: frozenset[str]
) -> tuple[Tensor, ...]:
    """A sweep for the statistics, their merge, and a sweep for the gradients."""
    h, tensors, needs = operands[0], list[Any](operands), settings.needs
    place: Any = (settings.first, settings.vocab, settings.group, settings.reduce)
    how: Any = (settings.transform, ",".join(sorted(want)), settings.memory)
    swept = shards._shard_stats(*(*tensors, *how, *place, settings.own_labels))
    whole, local, _ = split_at(swept, len(STATS), len(SAVED_STATS))
    total = dict(zip(STATS, whole))
    c = ops._coefficients(coefficients, frozenset(), h)
    slope = c.lse
    if c.square is not None:
        square = 2 * c.square * total["lse"]
        slope = square if c.lse is None else c.lse + square
    upstream: dict[str, Tensor | None] = dict.fromkeys(DIFFERENTIABLE_STATS)
    upstream |= {"lse": slope, "picked": c.picked, "sum": c.sum}
    own_upstream(upstream, {each: total[each] for each in SAVED_STATS}, dict(zip(SAVED_STATS, local)))
    absent = h.new_empty(0, dtype=stat_dtype(h.dtype))
    grads: list[Tensor] = [absent] * 4
    if any(needs):
        upward = [absent if g is None else g for g in upstream.values()]
        swept = shards._shard_stats_backward(
            *upward, *operands, *local, settings.transform, settings.memory, *needs, *place
        )
        grads = list(swept[:4])
    return _outputs(h, settings, total, grads, None)


def _fake(*args: Any) -> tuple[Tensor, ...]:
    h, settings = args[0], Settings(*args[HEAD_OPERANDS + COEFFICIENTS :])
    results = list(fakes.fake_head_loss(*args))
    wide = stat_dtype(h.dtype)
    if settings.need_h and not settings.reduce:
        results[LOSS_OUTPUTS.index("dh")] = h.new_empty(h.shape, dtype=wide)
    return *results, h.new_empty(1, dtype=wide)


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    HEAD_LOSS[0](ctx, inputs, output)
    *_, after, recipient = inputs
    ctx.has_after, ctx.has_recipient, ctx.dtype = after is not None, recipient is not None, inputs[0].dtype


def _backward(ctx: Any, *upstream: Tensor | None) -> tuple:
    dh, *grads = HEAD_LOSS[1](ctx, *upstream)
    unrounded = dh if ctx.has_recipient else None
    dh = None if dh is None or ctx.has_recipient else dh.to(ctx.dtype)
    rest = (None,) * (LOSS_INPUTS - 3 - len(grads))
    return dh, *grads, *rest, upstream[-1] if ctx.has_after else None, unrounded


_ranged = ranges.ranged("shard_loss", ranges.operands_named(SCHEMA), _shard_loss)
register_op("shard_loss", SCHEMA, _ranged, _fake, (_setup, _backward))
