"""The words that every engine of a head speaks: what goes in, what is asked, what comes out.

A *head* is ``z = transform(h @ w.T)`` with z [N, V] the logits, which no engine may build whole.
An *engine* is a module with the three functions ``head_stats``, ``head_stats_backward`` and ``head_loss``
below (``torch_engine.engine`` and ``triton_engine.engine``); `lowering` picks one and calls it. All statistics are
float32 and per row. This file knows nothing of graphs, ops or autograd.

    def head_stats(head: Head, want: frozenset[str], windows: Windows) -> RowStats
    def head_stats_backward(head: Head, upstream: RowGrads, stats: RowStats, needs: Needs, windows) -> HeadGrads
    def head_loss(head: Head, coefficients: RowGrads, needs: Needs, windows) -> tuple[RowStats, HeadGrads]

``head_stats`` is one sweep over z. ``head_stats_backward`` sweeps again, rebuilding z window by window, for any
per-row upstream gradient. The lse goes from one to the other as the unevaluated sum of two numbers: half a unit of
an lse of 200 is 8e-6 of every probability, where eager code, which subtracts the maximum first, errs by 1e-7. So does
a difference in the graph: lse - z_y is taken as (lse - z_y) + lse_low, and Σ u (lse - z) has the digits of ``spread``.
``head_loss`` is the single sweep for a scalar loss that is linear in the statistics: its coefficients are the
upstream gradients, known before the sweep, so that the gradients come out of it too.

    dz_u[i, v] = (lse_i' + 2 square_i' lse_i) p[i, v] + Σ_k picked_ik' [v = y_ik] + sum_i' u_v
                 - entropy_i' p[i, v] (log p[i, v] + entropy_i)      then through the transform's derivative
    (a prime marks the upstream gradient of that statistic)

A row with a logit that is NaN or +inf, or with none above -inf, has an lse that says so and NaN for all its gradients
of a softmax, as eager code's log_softmax gives; other rows are not touched by it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fusedhead.kernels.transform.transform import Transform

STATS = ("lse", "picked", "sum", "entropy", "max", "argmax", "lse_low", "spread")


def stat_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of every statistic: float32, and float64 for a float64 head."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Head(NamedTuple):
    """The operands of one head. N tokens, D hidden, V vocab, K labels a row, C column and R row vectors."""

    h: Tensor  # [N, D] hidden, floating
    w: Tensor  # [V, D] weight, dtype of h; either dimension may be the contiguous one
    y: Tensor  # [N, K] int64 labels in [0, V); K = 0 when nothing is picked
    cols: Tensor  # [C, V] float32 vectors along the vocabulary that the transform names
    rows: Tensor  # [R, N] float32 vectors along the tokens that the transform names
    u: Tensor  # [V] float32 weights of the statistic `sum`, or [0] for all ones
    transform: Transform  # what happens to z = h @ w.T, element by element


class RowStats(NamedTuple):
    """Per-row results, None where not asked."""

    lse: Tensor  # [N] float32, log Σ_v exp z
    picked: Tensor | None = None  # [N, K] float32, z[i, y_ik]
    sum: Tensor | None = None  # [N] float32, Σ_v u_v z[i, v]
    entropy: Tensor | None = None  # [N] float32, -Σ_v p log p
    max: Tensor | None = None  # [N] float32, of z as the program rounds it (Transform steps `round`)
    argmax: Tensor | None = None  # [N] int64, the first index on ties, of z as the program rounds it
    lse_low: Tensor | None = None  # [N] float32, finite, what rounding took off lse: p = exp((z - lse) - lse_low)
    spread: Tensor | None = None  # [N] float32, Σ_v u_v (lse - z[i, v]): without the digits that lse and sum lose alike
    tie: Tensor | None = None  # [] float32, -0.0: of head_loss, where a kernel writes it at no cost


class RowGrads(NamedTuple):
    """Gradient of the loss with respect to each statistic, None for zero."""

    lse: Tensor | None = None  # [N] float32
    picked: Tensor | None = None  # [N, K] float32
    sum: Tensor | None = None  # [N] float32
    entropy: Tensor | None = None  # [N] float32; not allowed in head_loss
    square: Tensor | None = None  # [N] float32, of lse²; only in head_loss


class Needs(NamedTuple):
    """Which operands want a gradient."""

    h: bool
    w: bool
    cols: bool
    rows: bool


class HeadGrads(NamedTuple):
    """Gradients of the operands, None where not needed."""

    h: Tensor | None  # [N, D] dtype of h
    w: Tensor | None  # [V, D] dtype of w, contiguous
    cols: Tensor | None  # [C, V] float32
    rows: Tensor | None  # [R, N] float32


class Windows(NamedTuple):
    """How a sweep is cut. An engine may round to its tiles, never above what the planner allowed."""

    tokens: int  # rows of z held at once
    vocab: int  # columns of z held at once
    accumulate: torch.dtype  # dtype in which dW (token windows) or dH (vocabulary windows) is accumulated
