"""The merge of row statistics over the ranks that hold the columns, in one collective: a gather of packed numbers.

With M = max_r lse_r, e_r = exp(lse_r - M), E = Σ e_r, U_r = Σ u over r's columns, H_r and the others of r's columns
alone, x_r = (lse_r - M) - H_r the mean of log p + log E over them:

    lse      = M + log E                                 two numbers, as everywhere: what rounding took off is lse_low
    picked   = Σ_r picked_r                              one rank has the label's column, the others add 0
    sum      = Σ_r sum_r
    spread   = Σ_r (spread_r - U_r (lse_r - M)) + U (lse - M)
    entropy  = log E - m,  m = Σ_r e_r x_r / E
    variance = Σ_r e_r (variance_r + (x_r - m)²) / E     of log p under p
    max      = max_r max_r, argmax of the first rank that has it: the lowest index; NaN is the largest, as in torch

Every rank adds the same numbers in the order of the ranks, so that all have the same bits. A rank receives 4 bytes a
token from each other one for every number that is asked (8 for float64); two all-reduces, a maximum and a sum, would
send fewer where the ranks are many, and wait twice.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

SHARD_MISMATCH = (
    "the ranks of the group do not hold shards of one head, or were asked for different things: the hidden size, the "
    "number of classes and every argument must be the same on all of them"
)


class ShardMismatch(ValueError):
    """The ranks of a group do not hold shards of one head, or ask for different things."""


@dataclass(frozen=True)
class Part:
    """The statistics of one rank's columns, [N] (float64 for a float64 head, else float32), None where not asked."""

    weight: Tensor  # [], Σ u over the rank's columns
    lse: Tensor | None = None  # -inf where a row has no column here
    lse_low: Tensor | None = None
    picked: Tensor | None = None  # [N, K], 0 where the label is elsewhere
    sum: Tensor | None = None
    spread: Tensor | None = None
    entropy: Tensor | None = None
    variance: Tensor | None = None
    max: Tensor | None = None
    argmax: Tensor | None = None  # int64, a class of all


def collective(*names: str) -> Any:
    """The first of some names that this torch.distributed has: newer ones deprecate what older ones call by another."""
    return next(function for function in (getattr(dist, name, None) for name in names) if function is not None)


def gathered(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[R, ...]: x of every rank, in the order of the ranks."""
    ranks = dist.get_world_size(group)
    whole = x.new_empty((ranks * x.numel(),))
    collective("all_gather_single", "all_gather_into_tensor")(whole, x.contiguous().view(-1), group=group)
    return whole.view(ranks, *x.shape)


def gathered_parts(part: Part, flag: Tensor, group: dist.ProcessGroup) -> tuple[Part, Tensor]:
    """(the parts of all ranks, each tensor with a first dimension [R]; ``flag`` [F] int32 of all), one collective."""
    values: dict[str, Tensor] = {}
    for field in fields(Part):
        value = getattr(part, field.name)
        if value is not None:
            values[field.name] = value.to(torch.int32) if field.name == "argmax" else value.contiguous()
    words = [flag, *(value.view(-1).view(torch.int32) for value in values.values())]
    packed = gathered(torch.cat(words), group)
    flags, *rest = packed.split([len(word) for word in words], 1)
    parts: dict[str, Any] = {}
    for (name, value), bits in zip(values.items(), rest):
        bits = bits.clone(memory_format=torch.contiguous_format)  # of one rank: a view at which no float64 may start
        parts[name] = bits.view(value.dtype).view(len(packed), *value.shape)
    if "argmax" in parts:
        parts["argmax"] = parts["argmax"].to(torch.int64)
    return Part(**parts), flags


def merged(parts: Part) -> dict[str, Tensor]:
    """The statistics of all columns by their names, equal on all ranks, of the `gathered_parts`."""
    total_of: dict[str, Tensor] = {}
    if parts.max is not None and parts.argmax is not None:
        total_of["max"], rank = parts.max.max(0)
        total_of["argmax"] = parts.argmax.gather(0, rank[None])[0]
    if parts.picked is not None:
        total_of["picked"] = parts.picked.sum(0)
    if parts.sum is not None:
        total_of["sum"] = parts.sum.sum(0)
    if parts.lse is None or parts.lse_low is None:
        return total_of
    top = parts.lse.amax(0)
    shift = torch.where(top.isfinite(), top, 0)
    log_mass = (parts.lse - shift) + parts.lse_low
    mass = log_mass.exp()
    total = mass.sum(0)
    log = total.log()
    lse = shift + log
    total_of["lse"], total_of["lse_low"] = lse, torch.where(lse.isfinite(), log - (lse - shift), 0)
    if parts.spread is not None:
        weight = parts.weight[:, None]
        reach = parts.spread - torch.where(weight == 0, 0, weight * log_mass)
        total_of["spread"] = reach.sum(0) + weight.sum(0) * log
    if parts.entropy is not None:
        # nothing of ranks without columns; a row whose columns are all masked there has an entropy that says so
        void = (mass == 0) & parts.entropy.isfinite()
        mean = log_mass - parts.entropy
        middle = torch.where(void, 0, mass * mean).sum(0) / total
        total_of["entropy"] = log - middle
        if parts.variance is not None:
            square = torch.where(void, 0, mass * (parts.variance + (mean - middle) ** 2))
            total_of["variance"] = square.sum(0) / total
    return total_of


def own_upstream(upstream: dict[str, Tensor | None], total: dict[str, Tensor], local: dict[str, Tensor]) -> None:
    """Make of the gradients of the lse, entropy H and variance V of all ranks, in place, those of this rank's.

    No collective: with q = exp(lse_r - lse) this rank's share and δ = log q + H - H_r,

        d lse_r = q (g_lse + g_V (δ² + 2δ - V + V_r) - g_H δ)    d H_r = q (g_H - 2 g_V δ)    d V_r = q g_V

    which give dz = p (g_lse - g_H d + g_V (d² + 2d - V)) with d = log p + H, once written with p_r = p / q.
    """
    g_lse, g_entropy, g_variance = (upstream[name] for name in ("lse", "entropy", "variance"))
    if g_lse is None and g_entropy is None and g_variance is None:
        return
    log = (local["lse"] - total["lse"]) + (local["lse_low"] - total["lse_low"])
    share = log.exp() + 0 * total["lse"]  # NaN where a logit is +inf, on ranks without it too
    nothing = share == 0
    slopes: dict[str, Any] = {"lse": 0 if g_lse is None else g_lse, "entropy": None, "variance": None}
    if g_entropy is not None or g_variance is not None:
        delta = log + total["entropy"] - local["entropy"]
        slopes["entropy"] = 0 if g_entropy is None else g_entropy
        if g_entropy is not None:
            slopes["lse"] = slopes["lse"] - g_entropy * delta
        if g_variance is not None:
            slopes["lse"] = slopes["lse"] + g_variance * (delta * (delta + 2) - (total["variance"] - local["variance"]))
            slopes["entropy"] = slopes["entropy"] - 2 * g_variance * delta
            slopes["variance"] = g_variance
    for name, slope in slopes.items():
        upstream[name] = None if slope is None else torch.where(nothing, 0, slope * share)
