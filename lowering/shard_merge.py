"""The merge of row statistics over the ranks that hold the columns, in two collectives on packed numbers.

With M = max_r lse_r, e_r = exp(lse_r - M), U_r = Σ u over r's columns, H_r and the others of r's columns alone:

    lse     = M + log Σ_r e_r                         two numbers, as everywhere: what rounding took off is lse_low
    picked  = Σ_r picked_r                            one rank has the label's column, the others add 0
    sum     = Σ_r sum_r
    spread  = Σ_r (spread_r - U_r (lse_r - M)) + U (lse - M)
    entropy = Σ_r e_r (H_r - (lse_r - M)) / Σ_r e_r + log Σ_r e_r
    max     = max_r max_r, argmax the lowest index among the ranks that have it; NaN is the largest number, as in torch

First a maximum of lse, or of 64-bit keys where max or argmax is asked (the number in order-preserving bits above the
index counted down); then one packed sum. Bytes a token and rank: 4 (keys: 8, 16 with lse), then 4 for each of e, the
K picked, sum, spread, U and entropy that is asked. This file knows no heads and no graphs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

PRIME = 8388593  # the largest below 2^23: what a mark is taken modulo, exact in float32
LOW = (1 << 32) - 1
SHARD_MISMATCH = (
    "the ranks of a tensor-parallel head do not hold shards of one head, or take its loss of other tokens or labels: "
    "labels, sizes and every argument must be the same on all ranks of the group"
)


class ShardMismatch(ValueError):
    """The ranks of a group do not hold shards of one head, or ask for different things."""


@dataclass(frozen=True)
class Part:
    """The statistics of one rank's columns, [N] float32 but picked [N, K] and argmax int64; None where not asked."""

    first: int  # the first class of the rank; past the last one for a rank without
    weight: Tensor  # [], Σ u over the rank's columns
    lse: Tensor | None = None
    picked: Tensor | None = None  # 0 where the label is elsewhere
    sum: Tensor | None = None
    entropy: Tensor | None = None
    max: Tensor | None = None
    argmax: Tensor | None = None
    lse_low: Tensor | None = None
    spread: Tensor | None = None


def mark_of(y: Tensor, facts: int) -> Tensor:
    """[] int64 below `PRIME`: equal where labels [N, K] and facts are."""
    at = torch.arange(1, y.numel() + 1, device=y.device) % PRIME
    return ((y.reshape(-1) % PRIME) * at % PRIME).sum().add(facts + y.numel()) % PRIME


def require_equal(most: Tensor, least: Tensor) -> None:
    """Fail, on every rank alike, where what the ranks said of themselves differs."""
    if most.is_cpu:
        if int(most) != int(least):
            raise ShardMismatch(SHARD_MISMATCH)
    else:
        torch.ops.aten._assert_async.msg(most == least, SHARD_MISMATCH)


def ordered(x: Tensor) -> Tensor:
    """float32 -> int64 in [-2^31, 2^31), in the order of the numbers; NaN is the largest, and -0 is 0."""
    bits = x.contiguous().view(torch.int32).to(torch.int64)
    magnitude = bits & 0x7FFFFFFF
    return torch.where(x.isnan(), 0x7FFFFFFF, torch.where(bits < 0, -magnitude, magnitude))


def number(key: Tensor) -> Tensor:
    """The float32 that `ordered` made a key of."""
    bits = torch.where(key < 0, -key - (1 << 31), key)
    return bits.to(torch.int32).view(torch.float32)


def highest(part: Part, mark: Tensor, group: dist.ProcessGroup) -> dict[str, Tensor]:
    """The maxima over the ranks of lse, and of max with its index. Raises ShardMismatch where marks differ."""
    marks = torch.stack((mark, -mark))
    if part.max is None and part.argmax is None:
        lse = mark.new_empty(0, dtype=torch.float32) if part.lse is None else part.lse
        packed = torch.cat((lse, marks.to(lse.dtype)))
        dist.all_reduce(packed, op=dist.ReduceOp.MAX, group=group)
        require_equal(packed[-2], -packed[-1])
        return {} if part.lse is None else {"lse": packed[:-2]}
    assert part.max is not None
    assert part.argmax is not None
    keys = ordered(part.max) * (1 << 32) + (LOW - (part.argmax + part.first))
    tops = [keys] if part.lse is None else [keys, ordered(part.lse)]
    packed = torch.cat((*tops, marks))
    dist.all_reduce(packed, op=dist.ReduceOp.MAX, group=group)
    require_equal(packed[-2], -packed[-1])
    rows = len(keys)
    found = {"max": number(packed[:rows] >> 32), "argmax": LOW - (packed[:rows] & LOW)}
    return found if part.lse is None else {**found, "lse": number(packed[rows:-2])}


def merged(part: Part, y: Tensor, facts: int, group: dist.ProcessGroup) -> dict[str, Tensor]:
    """The statistics of all columns by their names, equal on all ranks. Labels ``y`` [N, K] are those of all ranks."""
    found = highest(part, mark_of(y, facts), group)
    parts: dict[str, Tensor] = {}
    if part.lse is not None and part.lse_low is not None:
        top = found["lse"]
        shift = torch.where(top.isfinite(), top, 0)
        here = (part.lse - shift) + part.lse_low
        mass = here.exp()
        parts["mass"] = mass[None]
        if part.spread is not None:
            parts["reach"] = (part.spread - torch.where(part.weight == 0, 0, part.weight * here))[None]
            parts["weight"] = part.weight.expand(1, len(mass))
        if part.entropy is not None:
            parts["entropy"] = torch.where(mass == 0, 0, mass * (part.entropy - here))[None]
    if part.picked is not None:
        parts["picked"] = part.picked.t()
    if part.sum is not None:
        parts["sum"] = part.sum[None]
    if parts:
        packed = torch.cat(list(parts.values()))
        dist.all_reduce(packed, group=group)
        parts = dict(zip(parts, packed.split([len(p) for p in parts.values()])))
    if "mass" in parts:
        total = parts["mass"][0]
        log = total.log()
        lse = shift + log
        found["lse"], found["lse_low"] = lse, torch.where(lse.isfinite(), log - (lse - shift), 0)
        if "reach" in parts:
            found["spread"] = parts["reach"][0] + parts["weight"][0] * log
        if "entropy" in parts:
            found["entropy"] = parts["entropy"][0] / total + log
    if "picked" in parts:
        found["picked"] = parts["picked"].t().clone(memory_format=torch.contiguous_format)
    if "sum" in parts:
        found["sum"] = parts["sum"][0].clone()
    return found
