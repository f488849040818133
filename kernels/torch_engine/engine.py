"""The torch engine: computes a head window by window, on every device that torch runs on.

The three functions of `contract`. Each chooses among the sweeps:

    softmax_gradients   lse and picked, and gradients a row scale away from exp z    the usual losses
    dlogits             gradients with dz written out block by block                entropy, row vectors
    statistics          every statistic from the logits                             entropy, variance, argmax
    weighted_sums       weighted sums of plain logits, without a sweep              label smoothing

`lowering.plan` decides how large the windows are.
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
from fusedhead.kernels.torch_engine import dlogits as torch_dlogits
from fusedhead.kernels.torch_engine import softmax_gradients
from fusedhead.kernels.torch_engine import statistics as torch_statistics
from fusedhead.kernels.torch_engine.blocks import row_dtype
from fusedhead.kernels.torch_engine.weighted_sums import spread_from_sums, weighted_sums


def head_stats(head: Head, want: frozenset[str], windows: Windows) -> RowStats:
    """One sweep over z for the statistics in ``want``, see `contract.RowStats`."""
    scale, wide = head.transform.plain_scale, stat_dtype(head.h.dtype)
    swept = want - {"sum", "spread"} if scale is not None else want
    if "spread" in want:
        swept |= {"lse"}
    if swept <= {"picked"}:
        picked = torch_statistics.picked_logits(head, windows.tokens) if swept else None
        stats = RowStats(head.h.new_empty(0, dtype=wide), picked)
    elif swept <= {"lse", "picked"}:
        _, stats, _ = softmax_gradients.single_pass(head, RowGrads(), NO_NEEDS, windows)
        stats = stats if "picked" in want else stats._replace(picked=None)
    else:
        stats = torch_statistics.sweep_statistics(head, swept, windows)
    if want & {"sum", "spread"} and scale is not None:
        total = weighted_sums(head, scale)
        spread = spread_from_sums(head, one_number(stats, total.dtype), total) if "spread" in want else None
        stats = stats._replace(sum=total.to(wide) if "sum" in want else None, spread=spread)
    return stats


def one_number(stats: RowStats, fine: torch.dtype) -> Tensor:
    """The lse [N] in `row_dtype`, with its rounding error added."""
    lse = stats.lse.to(fine)
    return lse if stats.lse_low is None else lse + stats.lse_low.to(fine)


def _by_row_scale(head: Head, upstream: RowGrads, needs: Needs) -> bool:
    """Whether gradients are exponentials times one number a row.

    That number is NaN where masks leave no column, so this is False then; the general gradient applies the mask after
    it. On a GPU the masks are not looked at, since the host would wait.
    """
    masked = head.transform.masked_columns(head.cols) if head.h.device.type == "cpu" else None
    any_column = masked is None or not bool(masked.all())
    return any_column and softmax_gradients.supports(head, upstream, needs)


def head_stats_backward(head: Head, upstream: RowGrads, stats: RowStats, needs: Needs, windows: Windows) -> HeadGrads:
    """One sweep over z for the gradients of any per-row upstream."""
    masked = head.transform.masked_columns(head.cols)
    if masked is not None and upstream.picked is not None:  # a masked label has no gradient, not even NaN
        upstream = upstream._replace(picked=upstream.picked.masked_fill(masked[head.y], 0))
    if _by_row_scale(head, upstream, needs):
        if upstream.lse is None and upstream.square is None:
            return softmax_gradients.labels_alone(head, upstream, needs, windows)
        lse = one_number(stats, row_dtype(head.h.device.type))
        return softmax_gradients.known_lse(head, upstream, lse, needs, windows)
    return torch_dlogits.backward(head, upstream, stats, needs, windows)


def other_columns_serve(head: Head, coefficients: RowGrads, needs: Needs, windows: Windows) -> bool:
    """Whether `head_loss` takes ``other_columns``: only where one sweep gives statistics and gradients."""
    whole_rows = windows.vocab >= len(head.w) or not (needs.w or needs.cols)
    unmasked = head.transform.masked_columns(head.cols) is None
    return whole_rows and unmasked and softmax_gradients.supports(head, coefficients, needs)


def with_sums(head: Head, total: Tensor, other_columns: OtherColumns) -> OtherColumns:
    """``other_columns`` with the sums [N] among the statistics that it is called with."""

    def other_lse(i: slice, stats: RowStats) -> Tensor:
        some = total[i]
        spread = spread_from_sums(head, one_number(stats, some.dtype), some)
        return other_columns(i, stats._replace(sum=some.to(spread.dtype), spread=spread))

    return other_lse


def head_loss(
    head: Head,
    coefficients: RowGrads,
    needs: Needs,
    windows: Windows,
    other_columns: OtherColumns | None = None,
) -> tuple[RowStats, HeadGrads]:
    """Statistics and gradients of a loss linear in them, in one sweep where the plan allows.

    If w wants a gradient and ``windows.vocab`` is less than V, a first sweep finds the lse and a second one
    the gradients; that costs one product more and only one block of memory.
    """
    scale, wide = head.transform.plain_scale, stat_dtype(head.h.dtype)
    if not _by_row_scale(head, coefficients, needs):
        want = {"lse", "picked"} | ({"sum", "spread"} if coefficients.sum is not None else set())
        stats = head_stats(head, frozenset(want), windows)
        return stats, torch_dlogits.backward(head, coefficients, stats, needs, windows)
    whole_rows = windows.vocab >= len(head.w) or not (needs.w or needs.cols)
    needs_now = needs if whole_rows else NO_NEEDS
    total = weighted_sums(head, scale) if coefficients.sum is not None and scale is not None else None
    with_statistics = other_columns if other_columns is None or total is None else with_sums(head, total, other_columns)
    lse, stats, grads = softmax_gradients.single_pass(head, coefficients, needs_now, windows, with_statistics)
    if not whole_rows:
        grads = softmax_gradients.known_lse(head, coefficients, lse, needs, windows)
    if total is not None:
        stats = stats._replace(sum=total.to(wide), spread=spread_from_sums(head, lse, total))
    return stats, grads
