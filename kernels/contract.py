"""The contract of the engines: the operands of a head, its statistics, and their gradients.

A *head* is ``z = transform(h @ w.T)`` with z [N, V] the logits, which no engine may build whole.
An *engine* is a module with the three functions ``head_stats``, ``head_stats_backward`` and ``head_loss``
below (``torch_engine.engine`` and ``triton_engine.engine``); `lowering` picks one and calls it. All statistics are
float32 and per row.

    def head_stats(head: Head, want: frozenset[str], windows: Windows) -> RowStats
    def head_stats_backward(head: Head, upstream: RowGrads, stats: RowStats, needs: Needs, windows) -> HeadGrads
    def head_loss(head: Head, coefficients: RowGrads, needs: Needs, windows) -> tuple[RowStats, HeadGrads]

``head_stats`` is one sweep over z. ``head_stats_backward`` sweeps again, rebuilding z window by window, for any per-row
upstream gradient. The lse is passed on as the unevaluated sum of two numbers: half a unit of an lse of 200 is 8e-6 of
every probability, where eager code, which subtracts the maximum first, errs by 1e-7. Differences in the graph keep
these digits too: lse - z_y is (lse - z_y) + lse_low, and Σ u (lse - z) has the digits of ``spread``. ``head_loss`` is
the single sweep for a scalar loss that is linear in the statistics: its coefficients are the upstream gradients and
known before the sweep, which therefore computes the gradients too.

    dz_u[i, v] = p (constant_i - linear_i d + quadratic_i d²) + Σ_k picked_ik' [v = y_ik] + sum_i' u_v
    with d = log p + entropy_i
    (a prime marks the upstream gradient of that statistic; `logit_grads`), then through the transform's derivative

A statistic is a row of `STATISTICS`, from which the ops' schemas, fake results, autograd and the planner are derived.

A row with a logit that is NaN or +inf, or with no logit above -inf, has that lse, and NaN for all gradients of its
softmax, as eager code's log_softmax gives. Other rows are not affected.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from fusedhead.kernels.transform.transform import Transform


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
    transform: Transform  # applied to z = h @ w.T elementwise


class RowStats(NamedTuple):
    """Per-row results, None where not asked."""

    lse: Tensor  # [N] float32, log Σ_v exp z
    picked: Tensor | None = None  # [N, K] float32, z[i, y_ik]
    sum: Tensor | None = None  # [N] float32, Σ_v u_v z[i, v]
    entropy: Tensor | None = None  # [N] float32, -Σ_v p log p
    max: Tensor | None = None  # [N] float32, of z rounded as in the program (steps `round`)
    argmax: Tensor | None = None  # [N] int64, the first index on ties, of z rounded as in the program
    lse_low: Tensor | None = None  # [N] float32, finite, the rounding error of lse: p = exp((z - lse) - lse_low)
    spread: Tensor | None = None  # [N] float32, Σ_v u_v (lse - z[i, v]): without cancellation between lse and sum
    variance: Tensor | None = None  # [N] float32, Σ_v p (log p)² - (Σ_v p log p)²
    tie: Tensor | None = None  # [] float32, -0.0: of head_loss, where a kernel writes it at no cost


class RowGrads(NamedTuple):
    """Gradient of the loss with respect to each statistic, None for zero."""

    lse: Tensor | None = None  # [N] float32
    picked: Tensor | None = None  # [N, K] float32
    sum: Tensor | None = None  # [N] float32
    entropy: Tensor | None = None  # [N] float32; not allowed in head_loss
    square: Tensor | None = None  # [N] float32, of lse²; only in head_loss
    variance: Tensor | None = None  # [N] float32; not allowed in head_loss

    @property
    def nonlinear(self) -> bool:
        """Whether a statistic has a gradient in which a loss is not linear (`Statistic.linear`)."""
        names = (s.name for s in STATISTICS if s.differentiable and not s.linear)
        return any(getattr(self, name) is not None for name in names)


# Of tokens i, given lse, lse_low, picked and, where a sum has a coefficient, sum and spread of the columns that a head
# holds: the lse [m] of the columns that it does not hold. An engine asks once a window of tokens, between its sweep and
# its gradient products.
OtherColumns = Callable[[slice, RowStats], Tensor]


class WholeLogits(NamedTuple):
    """All logits of a head, for the definitions of the statistics (`Statistic.of`)."""

    z: Tensor  # [N, V] transformed
    decided: Tensor  # [N, V] rounded where the program rounds
    logp: Tensor  # [N, V]
    y: Tensor  # [N, K]
    u: Tensor  # [V] or [0] for ones

    def weighted(self, x: Tensor) -> Tensor:
        return x @ self.u if self.u.numel() else x.sum(1)

    def mean(self, x: Tensor) -> Tensor:
        """Σ_v p x. A column with z = -inf makes it NaN, as ``(p * p.log()).sum(-1)`` does in a user's program."""
        return (self.logp.exp() * x).sum(1)

    def top(self, which: int) -> Tensor:
        empty = self.z.new_empty(len(self.z)), self.y.new_empty(len(self.z))
        return (self.decided.max(1) if self.z.numel() else empty)[which]


Slope = tuple[Tensor | None, Tensor | None, Tensor | None]  # constant, linear, quadratic of `LogitGrads`, [N] each


class Statistic(NamedTuple):
    """One number a row, or one a label of a row."""

    name: str
    of: Callable[[WholeLogits], Tensor]  # its definition, [N] or [N, K]
    linear: bool = False  # whether a loss may be linear in it: `head_loss` takes its coefficient
    per_label: bool = False
    dtype: torch.dtype | None = None  # None: `stat_dtype`
    differentiable: bool = True
    decision: bool = False  # computed from logits rounded as in the program
    companion: bool = False  # computed together with others, in `head_loss` too
    reads: tuple[str, ...] = ()  # statistics that its gradient reads, which are computed with it
    slope: Callable[[Tensor, RowStats], Slope] | None = None  # of an upstream gradient [N], where that is a softmax's


def slope_of_variance(g: Tensor, stats: RowStats) -> Slope:
    """d(variance)/dz = p (d² + 2 d - variance)."""
    assert stats.variance is not None
    return -g * stats.variance, -2 * g, g


SOFTMAX = ("lse", "lse_low")  # p = exp((z - lse) - lse_low)
STATISTICS = (
    Statistic("lse", lambda at: at.z.logsumexp(1), linear=True, reads=SOFTMAX, slope=lambda g, stats: (g, None, None)),
    Statistic("picked", lambda at: at.z.gather(1, at.y), linear=True, per_label=True),
    Statistic("sum", lambda at: at.weighted(at.z), linear=True),
    Statistic(
        "entropy", lambda at: -at.mean(at.logp), reads=(*SOFTMAX, "entropy"), slope=lambda g, stats: (None, g, None)
    ),
    Statistic("max", lambda at: at.top(0), differentiable=False, decision=True),
    Statistic("argmax", lambda at: at.top(1), dtype=torch.int64, differentiable=False, decision=True),
    Statistic("lse_low", lambda at: at.z.new_zeros(len(at.z)), differentiable=False, companion=True, reads=SOFTMAX),
    Statistic("spread", lambda at: -at.weighted(at.logp), differentiable=False, companion=True),
    Statistic(
        "variance",  # of log p under p
        lambda at: at.mean(at.logp**2) - at.mean(at.logp) ** 2,
        reads=(*SOFTMAX, "entropy", "variance"),
        slope=slope_of_variance,
    ),
)
STATS = tuple(s.name for s in STATISTICS)
LINEAR_STATS = tuple(s.name for s in STATISTICS if s.linear)
DECISIONS = frozenset(s.name for s in STATISTICS if s.decision)
COMPANIONS = tuple(s.name for s in STATISTICS if s.companion)
DIFFERENTIABLE_STATS = tuple(s.name for s in STATISTICS if s.differentiable)
SAVED_STATS = tuple(dict.fromkeys(name for s in STATISTICS for name in s.reads))  # for the backward pass
LOSS_OUTPUTS = (*LINEAR_STATS, "dh", "dw", "dcols", "drows", "tie", *COMPANIONS)  # of `head_loss`, in order


@lru_cache(maxsize=64)  # a step asks for every head it computes
def with_companions(want: frozenset[str]) -> frozenset[str]:
    """The given statistics with those that their gradients read."""
    return want.union(*(s.reads for s in STATISTICS if s.name in want))


class LogitGrads(NamedTuple):
    """The gradient of transformed logits by row, None for zero: p (constant - linear d + quadratic d²) of the softmax
    with d = log p + entropy, and the terms of the labels and of Σ u z.
    """

    constant: Tensor | None = None  # [N] float32
    linear: Tensor | None = None  # [N] float32
    quadratic: Tensor | None = None  # [N] float32
    picked: Tensor | None = None  # [N, K] float32
    sum: Tensor | None = None  # [N] float32

    @property
    def varies(self) -> bool:
        """Whether the softmax term is more than p times one number a row."""
        return self.linear is not None or self.quadratic is not None

    @property
    def soft(self) -> bool:
        """Whether it has a softmax term."""
        return self.constant is not None or self.varies


def logit_grads(upstream: RowGrads, stats: RowStats) -> LogitGrads:
    """The gradient of the logits from the gradients of the statistics."""
    constant, linear, quadratic = None, None, None
    for statistic in STATISTICS:
        g = getattr(upstream, statistic.name) if statistic.differentiable else None
        if g is not None and statistic.slope is not None:
            more = statistic.slope(g, stats)
            constant, linear, quadratic = map(plus, (constant, linear, quadratic), more)
    if upstream.square is not None:
        constant = plus(constant, 2 * upstream.square * stats.lse)
    return LogitGrads(constant, linear, quadratic, upstream.picked, upstream.sum)


def plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """a + b, None for zero."""
    return b if a is None else a if b is None else a + b


class Needs(NamedTuple):
    """Which operands want a gradient."""

    h: bool
    w: bool
    cols: bool
    rows: bool


NO_NEEDS = Needs(False, False, False, False)
OPERAND_NEEDS = Needs(True, True, False, False)  # h and w


class HeadGrads(NamedTuple):
    """Gradients of the operands, None where not needed."""

    h: Tensor | None  # [N, D] dtype of h, or the one that `Windows.dh` asks for
    w: Tensor | None  # [V, D] dtype of w, contiguous
    cols: Tensor | None  # [C, V] float32
    rows: Tensor | None  # [R, N] float32


WINDOW_STEP = 128  # tokens or columns that equal windows are cut to


class Windows(NamedTuple):
    """The windows of a sweep. An engine may round to its tiles, but never above the planner's sizes."""

    tokens: int  # rows of z held at once
    vocab: int  # columns of z held at once
    accumulate: torch.dtype  # dtype in which dW (token windows) or dH (vocabulary windows) is accumulated
    tail_rows: int = 0  # rows of the softmax's tail held at once in float8, where gradient products take it; else 0
    dh: torch.dtype | None = None  # dtype of dH, where it is a part of a sum that is rounded later; None: that of h
    threads: int = 0  # of the C++ kernel, where it computes windows on a CPU; 0 where torch ops do

    def dh_dtype(self, head: Head) -> torch.dtype:
        return self.dh or head.h.dtype


def even_size(total: int, size: int) -> int:
    """The rows of each of as many equal windows as windows of ``size`` would be: of whole tiles where ``size`` allows.

    The planner and the engines ask here, so that what a plan says is held is what is held.
    """
    size = max(size, 1)
    count = max(-(-total // size), 1)
    return max(min(-(-total // (WINDOW_STEP * count)) * WINDOW_STEP, size), 1)
