"""Row statistics of a head whose vocabulary is split over a process group: the merge of what each rank has swept.

Rank r holds W_r [V_r, D] and the statistics of its own columns. With M = max_r lse_r and e_r = exp(lse_r - M):

    lse    = M + log Σ_r e_r                    two numbers, as everywhere: the sum and what its rounding took off
    picked = Σ_r picked_r                       one rank has the label's column, the others add 0
    sum    = Σ_r sum_r
    spread = Σ_r (spread_r - U_r (lse_r - M)) + U (lse - M)          U_r = Σ u over r's columns, U = Σ_r U_r

Two collectives on float32 [N]: a maximum, and one packed sum. None in the backward: ∂lse/∂lse_r = exp(lse_r - lse), and
sums pass their gradient on. The gradient of the hidden states is summed over the ranks once, by `replicated_hidden`.
(The two-step merge is that of Megatron-LM's vocab-parallel cross entropy, on lse instead of on exponentials.)
Memory: a few [N] vectors. Bytes sent a token and rank: 4 for the maximum, 4 (2 + K) to 4 (3 + K) for the sum.
"""

from __future__ import annotations

import zlib
from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fusedhead.lowering.shard_merge import ShardMismatch

Group = dist.ProcessGroup


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, and float64 for a float64 head (`fusedhead.kernels.contract.stat_dtype`)."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class ShardStats(NamedTuple):
    """The statistics of one rank's columns. N tokens, K labels a token; all float32 (float64 for a float64 head)."""

    lse: Tensor  # [N], -inf where a row has no column here
    lse_low: Tensor  # [N], constant to autograd
    picked: Tensor  # [N, K], 0 where the label's column is elsewhere
    sum: Tensor | None = None  # [N]
    spread: Tensor | None = None  # [N], constant to autograd
    weight: Tensor | None = None  # [], Σ u over the rank's columns, beside `sum`


class _Replicated(torch.autograd.Function):
    """The identity on hidden states that every rank has whole; their gradient is the sum of all ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, group: Group, dtype: torch.dtype | None) -> Tensor:
        ctx.group, ctx.dtype = group, dtype
        return h.view_as(h)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, None, None]:
        total = d.to(ctx.dtype or d.dtype, copy=True, memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total.to(d.dtype), None, None


def replicated_hidden(h: Tensor, group: Group, reduce_dtype: torch.dtype | None = torch.float32) -> Tensor:
    """h [N, D], equal on all ranks of ``group``. Its gradient is summed over them once, in ``reduce_dtype``.

    None sums in h's own dtype, as stock torch does: half the bytes, one rounding a rank.
    """
    return _Replicated.apply(h, group, reduce_dtype)


class _Absent(torch.autograd.Function):
    """A tensor of constants that counts as made of h: on a rank without columns, too, h's gradient is reduced."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, constant: Tensor) -> Tensor:
        ctx.save_for_backward(h)
        return constant.clone()

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, None]:
        (h,) = ctx.saved_tensors
        return torch.zeros_like(h), None


def no_columns(h: Tensor, labels: int, dtype: torch.dtype) -> ShardStats:
    """The statistics of a rank that holds no column of the vocabulary."""
    rows = h.shape[0]
    lse = _Absent.apply(h, h.new_full((rows,), float("-inf"), dtype=dtype))
    zero = h.new_zeros(rows, dtype=dtype)
    return ShardStats(lse, zero, h.new_zeros((rows, labels), dtype=dtype), zero, zero, h.new_zeros((), dtype=dtype))


class _Merge(torch.autograd.Function):
    """`merge_shards` on tensors: (lse, picked, sum) differentiable, (lse_low, spread) constants."""

    @staticmethod
    def forward(
        ctx: Any,
        lse: Tensor,
        picked: Tensor,
        total: Tensor,
        lse_low: Tensor,
        spread: Tensor,
        weight: Tensor,
        asked: Tensor,
        group: Group,
    ) -> tuple[Tensor, ...]:
        rows = lse.shape[0]
        first = torch.cat((lse, asked, -asked))
        dist.all_reduce(first, op=dist.ReduceOp.MAX, group=group)
        top, most, least = first[:rows], first[rows], -first[rows + 1]
        require_agreement(most, least)
        shift = torch.where(top.isfinite(), top, torch.zeros_like(top))
        lse_of_shard = (lse - shift) + lse_low
        summed = total.numel() > 0
        parts = [lse_of_shard.exp(), *picked.unbind(1)]
        if summed:
            reach = torch.where(weight == 0, torch.zeros_like(lse_of_shard), weight * lse_of_shard)
            parts += [total, spread - reach, weight.expand(rows)]
        packed = torch.stack(parts)
        dist.all_reduce(packed, group=group)
        log = packed[0].log()
        merged = shift + log
        low = torch.where(merged.isfinite(), log - (merged - shift), torch.zeros_like(log))
        labels = picked.shape[1]
        everywhere = packed[1 : 1 + labels].t().contiguous()
        if summed:
            total, reach, weights = packed[1 + labels :].unbind(0)
            total, spread = total.clone(), reach + weights * log
        ctx.save_for_backward(torch.exp((lse - merged) + (lse_low - low)))
        ctx.mark_non_differentiable(low, spread)
        return merged, everywhere, total, low, spread

    @staticmethod
    def backward(
        ctx: Any, d_lse: Tensor | None, d_picked: Tensor | None, d_sum: Tensor | None, *_: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        (mass,) = ctx.saved_tensors
        return None if d_lse is None else d_lse * mass, d_picked, d_sum, None, None, None, None, None


MISMATCH = (
    "the ranks of the group do not hold shards of one head, or were asked for different things: the hidden size, the "
    "number of classes and every argument must be the same on all of them"
)


def require_agreement(most: Tensor, least: Tensor) -> None:
    """Fail, on every rank alike, where what the ranks said of themselves differs.

    ShardMismatch on a CPU; on a device, and in a compiled graph, torch's assertion, for which nobody waits.
    """
    if most.is_cpu and not torch.compiler.is_compiling():
        if not torch.equal(most, least):
            raise ShardMismatch(MISMATCH)
    else:
        torch.ops.aten._assert_async.msg(most == least, MISMATCH)


def fingerprint(facts: Hashable, like: Tensor) -> Tensor:
    """[1] of ``like``'s dtype: a number that ranks compare, equal where ``facts`` have equal texts."""
    return like.new_full((1,), float(zlib.crc32(repr(facts).encode()) & 0x7FFFFF))


def merge_shards(stats: ShardStats, group: Group, facts: Hashable = ()) -> ShardStats:
    """The statistics of the whole vocabulary, equal on all ranks, from those of each rank's columns.

    ``facts`` is what the ranks must agree on; where they differ, all of them raise ShardMismatch (on a GPU an assertion
    fails, since nobody waits for the device). Picked numbers of classes that are elsewhere must be 0.
    """
    empty = stats.lse.new_empty(0)
    lse, picked, total, low, spread = _Merge.apply(
        stats.lse,
        stats.picked,
        empty if stats.sum is None else stats.sum,
        stats.lse_low,
        empty if stats.spread is None else stats.spread,
        empty if stats.weight is None else stats.weight,
        fingerprint(facts, stats.lse),
        group,
    )
    if stats.sum is None:
        return ShardStats(lse, low, picked)
    return ShardStats(lse, low, picked, total, spread)


def bounds(vocab_size: int, ranks: int, rank: int) -> tuple[int, int]:
    """The classes [first, last) that DTensor's Shard(0) gives to a rank: ceil(V / ranks) each, the last ones fewer."""
    each = -(-vocab_size // ranks)
    return min(rank * each, vocab_size), min((rank + 1) * each, vocab_size)


def wrong_shard(classes: int, group: Group, vocab_size: int | None) -> str:
    """What is wrong with a shard of so many classes where ``vocab_size`` says how they are split, "" if nothing."""
    if vocab_size is None:
        return ""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    first, last = bounds(vocab_size, ranks, rank)
    if classes == last - first:
        return ""
    expected = f"{last - first} of the {vocab_size} rows that vocab_size names"
    return f"rank {rank} of {ranks} must hold {expected}. Got: {classes}; without vocab_size any split is taken"


def first_class(classes: int, group: Group, vocab_size: int | None, device: torch.device) -> tuple[Any, Any]:
    """(the first class of this rank, the number of all): ints where ``vocab_size`` says it, else [] int64 tensors.

    With ``vocab_size`` the shards are those of DTensor's Shard(0), ceil(V / ranks) each and the rest for the last ones,
    and nothing is sent. Without it every rank says how many classes it has, in one more collective.
    """
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    if vocab_size is not None:
        return bounds(vocab_size, ranks, rank)[0], vocab_size
    counts = torch.zeros(ranks, dtype=torch.int64, device=device)
    counts[rank] = classes
    dist.all_reduce(counts, group=group)
    return counts[:rank].sum(), counts.sum()
