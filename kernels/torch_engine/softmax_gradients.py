"""Gradients through a softmax, from exponentials: dz = s E' + t at the labels + g_sum u.

``s`` is one number per row and ``t`` one per label, so the matrix products read the exponentials as they are:

    dh_i = s_i (E' w)_i + Σ_k t_ik w[y_ik] + g_sum_i (uᵀ w)
    dw   = E'ᵀ (s ⊙ h) + Σ_ik t_ik onehot(y_ik) ⊗ h_i + u ⊗ (g_sumᵀ h)

`single_pass` knows no lse beforehand: it keeps one window of E' until the row sums are complete, 3 GEMMs in
all. `known_lse` is given the lse and keeps one block, 3 GEMMs. Both handle every upstream gradient of lse,
picked and (for z · c) sum; `supports` says when. The entropy and gradients of row vectors belong to
`torch_engine.dlogits`.

Never in memory: more than one window of E', any [N, V], w in another dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusedhead.kernels.contract import (
    NO_NEEDS,
    Head,
    HeadGrads,
    Needs,
    OtherColumns,
    RowGrads,
    RowStats,
    Windows,
    stat_dtype,
)
from fusedhead.kernels.torch_engine.block_window import BlockWindow, RowScale, Window
from fusedhead.kernels.torch_engine.blocks import (
    cuts,
    first_of_equal,
    label_cells,
    row_dtype,
    sampled_level,
    two_sum_error,
)
from fusedhead.kernels.torch_engine.cpp_window import CppWindow, cpp_label_logits
from fusedhead.kernels.torch_engine.exponentials import Level, below_maximum, label_terms, level_at
from fusedhead.kernels.torch_engine.far_rows import Factors, SweptRows, far, sweep_far_rows
from fusedhead.kernels.torch_engine.gradient_sink import Sink
from fusedhead.kernels.torch_engine.product_dtypes import kept_dtype, kept_range, product_dtype

LARGEST_SHARE = 600.0  # of e: float64 holds its power
NEAR = 40.0  # a level this far from the lse at most: exp of the distance stays within `kept_range`


def window_of(head: Head, needs: Needs, windows: Windows, keep: bool) -> Window:
    """The buffers and products of a sweep's windows, by the C++ kernel where the planner says so."""
    return (CppWindow if windows.threads else BlockWindow)(head, needs, windows, keep)


def _label_terms(head: Head, i: slice, windows: Windows) -> tuple[Tensor, Tensor]:
    """`label_terms` of the tokens i."""
    return label_terms(head, i, cpp_label_logits(head, i, windows.threads) if windows.threads else None)


def supports(head: Head, upstream: RowGrads, needs: Needs) -> bool:
    """Whether dz is E' times one number a row, apart from the labels and a rank-one term."""
    if upstream.nonlinear or needs.rows:
        return False
    plain = head.transform.plain_scale is not None
    biases = not needs.cols or head.transform.bias_slopes(len(head.cols)) is not None
    return (plain or upstream.sum is None) and biases


def _prepared(head: Head, upstream: RowGrads) -> tuple[Tensor, Tensor]:
    """Gradients of lse [N] and picked [N, K] in `row_dtype`, zeros where absent."""
    fine = row_dtype(head.h.device.type)
    lse = upstream.lse if upstream.lse is not None else head.h.new_zeros(len(head.h))
    picked = upstream.picked if upstream.picked is not None else head.h.new_zeros(head.y.shape)
    return lse.to(fine), picked.to(fine)


def _totals(parts: list[Tensor], z: Tensor, level: Level, first: Tensor) -> tuple[Tensor, Tensor]:
    """Row sums of E with the labels [m], and without each of the labels [m, K], from their parts.

    The second gives 1 - p of a label as (sum without it) / total, which does not cancel when p is nearly 1.
    """
    e = torch.exp(z - level.natural[:, None]) * first
    rest = torch.stack(parts).sum(0, dtype=e.dtype)
    of_labels = e.sum(1)
    return rest + of_labels, rest[:, None] + (of_labels[:, None] - e)


def _factors(c: RowGrads, head: Head, beyond: Tensor | None = None) -> Factors:
    """The function that computes s [m] and t [m, K] of a window's tokens from the gradients ``c``.

    s is NaN where the total is not finite, as log_softmax makes the gradient of a row with an infinite logit.
    ``beyond`` [N] is the lse of columns that the head does not hold.
    """
    g_lse, g_picked = _prepared(head, c)
    scale = head.transform.plain_scale

    def factors(
        i: slice, lse: Tensor, total: Tensor, without_label: Tensor, first: Tensor, slope: Tensor
    ) -> tuple[Tensor, Tensor]:
        if beyond is not None:
            # beyond e^600 the other columns outweigh the head's own, at most e^100, in every digit
            share = torch.exp((beyond[i] - lse).clamp(max=LARGEST_SHARE))
            more = torch.where(total > 0, total * share, (beyond[i] > -torch.inf).to(total.dtype))
            total, without_label = total + more, without_label + more[:, None]
            lse = torch.logaddexp(lse, beyond[i])
        g = g_lse[i] if c.square is None else g_lse[i] + 2 * c.square[i] * lse
        whole = g[:, None] * first
        t = (g_picked[i] + whole - whole * (without_label / total[:, None])) * slope
        s = g / total + 0 * total
        if beyond is not None:
            s = s.masked_fill(beyond[i] == torch.inf, torch.nan)
        return (s if scale is None else s * scale), t

    return factors


def single_pass(
    head: Head, c: RowGrads, needs: Needs, windows: Windows, other_columns: OtherColumns | None = None
) -> tuple[Tensor, RowStats, HeadGrads]:
    """The lse [N] in `row_dtype`, lse and picked as statistics, gradients of Σ c · statistics + Σ c.square lse².

    With ``other_columns`` the statistics are those of the head's own columns, and c refers to the statistics of all.

    FLOP 6 NDV; memory: E' of one window (windows.tokens x V) where w wants a gradient, else one block.
    """
    wide = stat_dtype(head.h.dtype)
    z, slope = _label_terms(head, slice(0, len(head.h)), windows)
    lse, low = head.h.new_zeros((2, len(head.h)), dtype=row_dtype(head.h.device.type))
    rows = SweptRows(lse, low, z)
    sink = Sink(head, c, needs, windows)
    _sweep(head, c, needs, windows, rows, slope, sink, other_columns)
    return lse, _own_statistics(rows, slice(None), wide), sink.finish()  # `_sweep` has freed the window of E'


def _own_statistics(rows: SweptRows, i: slice, wide: torch.dtype) -> RowStats:
    """The lse of swept tokens as the sum of two numbers, and their labels' logits."""
    lse = rows.lse[i]
    high = lse.to(wide)
    low = (two_sum_error(high, lse, torch.zeros_like(lse)) + rows.low[i]).to(wide)
    return RowStats(high, rows.picked[i].to(wide), lse_low=low)


def _sweep(
    head: Head,
    c: RowGrads,
    needs: Needs,
    windows: Windows,
    rows: SweptRows,
    slopes: Tensor,
    sink: Sink,
    other_columns: OtherColumns | None = None,
) -> None:
    """The sweep of `single_pass`, which fills ``rows`` and ``sink``; ``slopes`` and rows.picked are `label_terms`."""
    n, wide, work = len(head.h), stat_dtype(head.h.dtype), product_dtype(head.h.dtype, head.h.device.type)
    tokens, keep = min(windows.tokens, n), needs.w or needs.cols
    window = window_of(head, needs, windows, keep)
    kept = kept_dtype(head.h.dtype, work, head.transform) if keep else work
    least, aim, most = kept_range(kept, head.transform)
    beyond = None if other_columns is None else torch.empty_like(rows.lse)
    factors = _factors(c, head, beyond)
    for i in cuts(n, tokens):
        h = head.h[i].to(work)
        z, slope = rows.picked[i], slopes[i]
        first, cells = first_of_equal(head.y[i]), label_cells(head, i)
        on_cpu = head.h.device.type == "cpu"
        level = window.usual_level(i, z, aim) if on_cpu else below_maximum(head, i, window.strip, aim, False)
        certain = not on_cpu
        while True:
            parts = window.exponentials(i, h, level, cells)
            total, without_label = _totals(parts, z, level, first)
            if certain or bool(((total > least) & (total < most)).all()):
                break
            level, certain = below_maximum(head, i, window.strip, aim, True), True
            if far(level.natural):
                break
        if on_cpu and certain and far(level.natural):
            if beyond is not None and other_columns is not None:  # it asks for the lse first
                sweep_far_rows(
                    head, i, _factors(RowGrads(), head), NO_NEEDS, window.strip, rows, Sink(head, c, NO_NEEDS, windows)
                )
                beyond[i] = other_columns(i, _own_statistics(rows, i, wide))
            sweep_far_rows(head, i, factors, needs, window.strip, rows, sink)
            continue
        rows.lse[i] = at = level.natural + total.log()
        if beyond is not None and other_columns is not None:
            beyond[i] = other_columns(i, _own_statistics(rows, i, wide))
        s, t = (x.to(wide) for x in factors(i, at, total, without_label, first, slope))
        window.gradients(i, h, s, t, sink)


def labels_alone(head: Head, upstream: RowGrads, needs: Needs, windows: Windows) -> HeadGrads:
    """The gradients where only picked logits and plain sums have an upstream gradient: no softmax, no sweep, no lse."""
    wide = stat_dtype(head.h.dtype)
    _, g_picked = _prepared(head, upstream)
    sink = Sink(head, upstream, needs, windows)
    if sink.dw is not None:
        sink.dw.begin_with_nothing()
    for i in cuts(len(head.h), min(windows.tokens, len(head.h))):
        m = i.stop - i.start
        t = (g_picked[i] * label_terms(head, i)[1]).to(wide)
        product = head.h.new_zeros((m, head.h.shape[1] if needs.h else 0), dtype=wide)
        sink.hidden(i, product, head.h.new_ones(m, dtype=wide), t)
        sink.labels(i, t)
    return sink.finish()


def known_lse(head: Head, upstream: RowGrads, lse: Tensor, needs: Needs, windows: Windows) -> HeadGrads:
    """The gradients when each row's lse [N] is known. FLOP 6 NDV; memory: one block, [windows.tokens, D] twice.

    The sweep sums the rows again. dh and the labels' terms use these sums and not the lse, whose rounding matters where
    the lse is large.
    """
    n, wide, fine = len(head.h), stat_dtype(head.h.dtype), row_dtype(head.h.device.type)
    work = product_dtype(head.h.dtype, head.h.device.type)
    tokens, window = min(windows.tokens, n), window_of(head, needs, windows, keep=False)
    factors, (g_lse, picked) = _factors(upstream, head), _prepared(head, upstream)
    far_rows = SweptRows(torch.empty_like(g_lse), torch.empty_like(g_lse), torch.empty_like(picked))  # found again
    sink = Sink(head, upstream, needs, windows)
    scale = head.transform.plain_scale
    for i in cuts(n, tokens):
        h, at, on_cpu = head.h[i].to(work), lse[i].to(fine), head.h.device.type == "cpu"
        if on_cpu and far(at.masked_fill(at.isinf(), 0)):
            sweep_far_rows(head, i, factors, needs, window.strip, far_rows, sink)
            continue
        cells, (z, slope) = label_cells(head, i), _label_terms(head, i, windows)
        level = level_at(head, at, False)
        if work != wide:
            near = window.usual_level(i, z, None) if on_cpu else level_at(head, sampled_level(head, i, work), False)
            level = level_at(head, torch.where((near.natural - at).abs() < NEAR, near.natural, at), near.exact)
        g = g_lse[i] if upstream.square is None else g_lse[i] + 2 * upstream.square[i] * at
        early = g * torch.exp(level.natural - at) * (1.0 if scale is None else scale)
        early = early.to(wide)
        parts = window.exponentials(i, h, level, cells, RowScale(early, sink))
        first = first_of_equal(head.y[i])
        total, without_label = _totals(parts, z, level, first)
        s, t = (x.to(wide) for x in factors(i, at, total, without_label, first, slope))
        window.gradients(i, h, s, t, sink)
    return sink.finish()
