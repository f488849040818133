"""Differences between a row's lse and its logits, computed without cancelling digits, as in eager code.

A log_softmax subtracts the row's maximum before it rounds. The difference of lse and z_y, each rounded alone, has the
rounding error of both: 1e-3 where the logits are near 1e4. The lse is therefore a sum of two numbers, and Σ u (lse - z)
is a statistic of its own. Both are constants to autograd: gradients flow through lse, z_y and Σ u z, of which the loss
stays the same linear function.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from fusedhead.ir.builder import Emit, named
from fusedhead.ir.terminal import Statistics

aten = torch.ops.aten
DIFFERENCE = frozenset({"picked", "lse_low"})  # statistics that `lse_less_picked` reads besides lse
SPREAD = frozenset({"sum", "spread"})  # statistics that `spread` reads besides lse


def normaliser(emit: Emit, stats: Statistics) -> Node:
    """The lse that a log_softmax subtracts: NaN where a logit is +inf, for which `logsumexp` is +inf.

    Computed as ``lse + 0 lse``, which changes no other number. The zero is detached: the slope must be 1 and read no
    statistic, or the loss would not be linear in the statistics.
    """
    return named(emit(aten.add.Tensor, stats.lse, emit(aten.detach.default, stats.lse), alpha=0), "normaliser")


def lse_less_picked(emit: Emit, stats: Statistics) -> Node:
    """lse - z_y of the first label [N]: (lse - z_y) + lse_low."""
    assert stats.picked is not None
    first = emit(aten.select.int, stats.picked, 1, 0)
    return emit(aten.add.Tensor, emit(aten.sub.Tensor, normaliser(emit, stats), first), stats.by_name["lse_low"])


def picked_less_lse(emit: Emit, stats: Statistics) -> Node:
    """z_y - lse of each label [N, K]: (z_y - lse) - lse_low."""
    high, low = (emit(aten.unsqueeze.default, x, 1) for x in (normaliser(emit, stats), stats.by_name["lse_low"]))
    return emit(aten.sub.Tensor, emit(aten.sub.Tensor, stats.picked, high), low)


def spread(emit: Emit, stats: Statistics, weight: Any) -> Node:
    """Σ_v u_v (lse - z) [N]: the gradient of lse · ``weight`` - sum, where ``weight`` is Σ u, and the value of spread.

    The correction between the two is finite, so that a row keeps its NaN or infinity.
    """
    rounded = emit(aten.sub.Tensor, emit(aten.mul.Tensor, stats.lse, weight), stats.sum)
    lost = emit(aten.sub.Tensor, stats.by_name["spread"], emit(aten.detach.default, rounded))
    return emit(aten.add.Tensor, rounded, emit(aten.nan_to_num.default, lost, 0.0, 0.0, 0.0))
