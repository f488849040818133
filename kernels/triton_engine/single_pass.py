"""The single pass: statistics and gradients of a loss that is linear in the statistics, in one sweep.

Per window of tokens, E = exp(z - reference) is stored, and `finalize` computes one factor s a row from the row sums:

    dw += Eᵀ (s ⊙ h)        dh = s ⊙ (E w)

Inputs: h [N, D], w [V, D], y [N, K], coefficients [N]. Outputs: dh [N, D], dw [V, D] in the operands' dtypes,
statistics [N] float32. z is computed once: 3 products of 2NDV FLOP. In memory: one window of E; dh, whose rows hold s ⊙
h until dw has read it; one float32 [window tokens, D]; and half of dw in float32 where the plan asks for it. Where the
plan keeps only some columns of E, a sweep of its own computes the lse of the other columns, and their dz is computed
again block by block: at most one product more, and sums of dh in float32, half of which lie in dh.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusedhead.kernels.contract import Head, HeadGrads, Needs, OtherColumns, RowGrads, RowStats, Windows, logit_grads
from fusedhead.kernels.gemm import gemm, weighted_rows
from fusedhead.kernels.narrow_sum import NarrowSum
from fusedhead.kernels.triton_engine.constants import LOG2E
from fusedhead.kernels.triton_engine.float8.level import LABELLED, STRIDED, row_levels
from fusedhead.kernels.triton_engine.launch.launch import on_device
from fusedhead.kernels.triton_engine.launch.sweep import Sweep, sweep
from fusedhead.kernels.triton_engine.recompute import rebuild
from fusedhead.kernels.triton_engine.rows.finalize import finalize
from fusedhead.kernels.triton_engine.rows.label_map import check_labels, map_labels
from fusedhead.kernels.triton_engine.rows.merge import merge_reference
from fusedhead.kernels.triton_engine.rows.reference_level import reference
from fusedhead.kernels.triton_engine.rows.scale_rows import scale_rows
from fusedhead.kernels.triton_engine.rows.unsafe_blocks import mark_unsafe, rebase_unsafe
from fusedhead.kernels.triton_engine.sweeps.exponentials import exponentials
from fusedhead.kernels.triton_engine.sweeps.statistics import launches, stream
from fusedhead.kernels.triton_engine.weight_gradient import WeightGradient
from fusedhead.kernels.triton_engine.windows import (
    first_rows,
    full_cuts,
    multiplied,
    new_window,
    ready_rows,
    rows_of,
    slice_head,
    slice_rows,
)

PARTLY = (torch.bfloat16,)  # dtypes in which a window may keep only some columns of E
FEW = 16  # up to this many tokens two sweeps run, which round dz once: so few terms do not average roundings out
FLOAT16_SHIFT = 10  # float16 exponentials are scaled by 2^10: small ones keep digits, targets up to 2^4 fit
LEVEL_SHIFT = 4  # and by 2^4 relative to a level, which is below the lse: probabilities from 2^-18 on keep all digits
LEVEL_TOTALS = 2.0**3, 2.0**15.5  # of a row that is not swept again: no number of it, nor its target's, is above 65504
GAINED_SHIFT = 4  # of s ⊙ h where coefficients are times a gain (`lowering.gain`): cuBLAS may round parts of Eᵀ (s ⊙ h)
LEVEL_SHARE = 8  # the level pays where the classes are this many times its sample


def estimates_level(head: Head) -> bool:
    """True if a float16 sweep takes its reference from a sample of the classes (the level), and not from the lse.

    The level is a lower bound of the lse of plain logits. A transform may raise what the sample misses.
    """
    plain = head.h.dtype == torch.float16 and not head.transform.smooth.steps
    return plain and head.w.shape[0] >= LEVEL_SHARE * (STRIDED + LABELLED)


def can_single_pass(head: Head, c: RowGrads, needs: Needs, windows: Windows) -> bool:
    """True if dz is a row factor times E (and a rank-one term), and the window has room for the rows of E.

    The window must hold whole rows of E. In bfloat16, and without a coefficient of ``sum``, it may hold some columns.
    """
    part = head.h.dtype in PARTLY and c.sum is None
    return (
        (needs.h or needs.w)
        and not (needs.cols or needs.rows)
        and (c.lse is not None or c.square is not None)
        and (c.sum is None or head.transform.factorises)
        and (part or windows.vocab >= head.w.shape[0])
        and head.h.shape[0] > FEW
    )


def other_columns_serve(head: Head, c: RowGrads, needs: Needs, windows: Windows) -> bool:
    """True if `one_pass` takes ``other_columns``: a bfloat16 head, a window of whole rows, no mask and no float8.

    In float32 the other columns' lse, which is rounded to float32, would make the row factors inexact.
    """
    whole = windows.vocab >= len(head.w) and not windows.tail_rows and head.transform.masked_columns(head.cols) is None
    return whole and head.h.dtype in PARTLY and can_single_pass(head, c, needs, windows)


def one_pass(
    head: Head, coefficients: RowGrads, needs: Needs, windows: Windows, other_columns: OtherColumns | None = None
) -> tuple[RowStats, HeadGrads]:
    """Statistics and gradients of a head that `can_single_pass` admits.

    ``other_columns`` gives the lse of the columns of other ranks (`other_columns_serve`): the statistics returned are
    those of this head's columns, and the coefficients refer to the statistics over all columns.
    """
    coefficients = ready_rows(coefficients)
    (n, hidden), vocab, narrow = head.h.shape, head.w.shape[0], head.h.dtype
    new = head.h.new_empty
    kept = slice(0, min(windows.vocab, vocab))
    uncached_columns = [slice(at, min(at + kept.stop, vocab)) for at in range(kept.stop, vocab, kept.stop)]
    lse, picked = new(n, dtype=torch.float32), new(head.y.shape, dtype=torch.float32)
    lse_low = torch.empty_like(lse)
    summed = coefficients.sum is not None
    total, spread = (torch.empty_like(lse) if summed else None for _ in range(2))
    weight = head.u.sum() if summed and head.u.numel() else None
    tie = new((), dtype=torch.float32)
    cuts = full_cuts(n, windows.tokens)
    tokens = cuts[0].stop
    with on_device(head.h):
        if uncached_columns:
            check_labels(head.y, vocab)  # otherwise `map_labels` checks them
        masked = head.transform.masked_columns(head.cols)
        if masked is not None and coefficients.picked is not None:  # a masked label has no gradient
            coefficients = coefficients._replace(picked=coefficients.picked.masked_fill(masked[head.y], 0))
        dh = new((n, hidden), dtype=windows.dh_dtype(head)) if needs.h else None
        dw = WeightGradient(head.w, len(cuts), windows.accumulate) if needs.w else None
        rank_one = None
        if coefficients.sum is not None:
            u = head.u if head.u.numel() else head.h.new_ones(vocab, dtype=torch.float32)
            r, f = head.transform.sum_terms(coefficients.sum, u, head.cols, head.rows)
            if dw is not None:
                dw.start(f, weighted_rows(r, head.h))
            rank_one = (r, weighted_rows(f, head.w)) if dh is not None else None
        buffer = new_window(head, tokens, kept.stop)
        ref2 = new(tokens, dtype=torch.float32)
        slope = torch.empty_like(picked[:tokens]) if head.transform.varies_along_row else picked  # picked: not written
        scaled = new((tokens, hidden)) if dw is not None and dh is None else None
        separate_dh_buffer = (
            dh is not None and dh.dtype != torch.float32 and not uncached_columns
        )  # E w is then a float32 product, which `scale_rows` rounds into dh
        product = new((tokens, hidden), dtype=torch.float32) if separate_dh_buffer else None
        level2 = row_levels(head) if estimates_level(head) else None
        gain = 1.0
        if narrow == torch.float16:
            gained = coefficients.square is None and not head.transform.smooth.steps
            gain = 2.0 ** (GAINED_SHIFT if gained else FLOAT16_SHIFT)
        for i in cuts:
            part, c = slice_head(head, i, kept), slice_rows(coefficients, i)
            m = part.h.shape[0]
            row_lse, row_low, row_picked = rows_of(lse, i), rows_of(lse_low, i), rows_of(picked, i)
            whole, other_lse = part, None
            if uncached_columns:  # the last kept tile may reach past the kept columns: it must not see labels there
                whole = slice_head(head, i, slice(0, vocab))
                part = part._replace(y=part.y.masked_fill(part.y >= kept.stop, -1))
                other_lse = _lse_of_uncached_columns(head, i, kept.stop, row_picked)
            exps, reference2 = first_rows(buffer, m), first_rows(ref2, m)
            row_dh = None if dh is None else rows_of(dh, i)
            logits = multiplied(part, exps)
            s = sweep("exp", part, frozenset({"sum"}) if summed else frozenset(), logits=logits)
            totals = new((3 if summed else 1, s.schedule.size), dtype=torch.float32)
            row_level = None if level2 is None else rows_of(level2, i)
            _exponentials(s, part, whole, exps, reference2, row_picked, slope, totals, logits, row_level)
            # the memory of dh's rows holds s ⊙ h until dw has read it
            sh = None if dw is None else _as_hidden(row_dh, narrow) if scaled is None else first_rows(scaled, m)
            rows = (reference2, row_picked, slope, totals)
            row_total = None if total is None else rows_of(total, i)
            row_spread = None if spread is None else rows_of(spread, i)
            sums = (row_total, row_spread, weight)
            if other_columns is not None:  # first the lse of the head's own columns, for the merge with the others
                unread = torch.empty_like(reference2)
                finalize(s, part, exps, *rows, RowGrads(), row_lse, row_low, *sums, None, gain, tie, scale=unread)
                local = RowStats(row_lse, row_picked, row_total, lse_low=row_low, spread=row_spread)
                other_lse = (other_columns(i, local) * LOG2E.value).to(torch.float32).contiguous()
                row_lse, row_low, sums = torch.empty_like(row_lse), torch.empty_like(row_low), (None, None, None)
            scale = finalize(s, part, exps, *rows, c, row_lse, row_low, *sums, sh, gain, tie, other_lse)
            if masked is not None:  # with all columns masked the softmax is NaN, and the gradient is 0
                for factor in (scale, sh):
                    if factor is not None:
                        factor.masked_fill_(masked.all(), 0)
            window = exps if exps.shape[1] == kept.stop else exps[:, : kept.stop]
            if dw is not None and sh is not None:
                dw.add(window, kept, sh, first=i.start == 0, alpha=1 / gain)
            outer = None if rank_one is None else (rows_of(rank_one[0], i), rank_one[1])
            if uncached_columns:
                _add_uncached_columns(
                    head, i, uncached_columns, part, exps, scale, c, RowStats(row_lse, lse_low=row_low), dw, row_dh
                )
            elif row_dh is not None:
                to = row_dh if product is None else first_rows(product, m)
                gemm(window, part.w, to)
                scale_rows(to, scale, row_dh, outer)
        del buffer, exps, window
        grads = HeadGrads(dh, None if dw is None else dw.finish(), None, None)
    return RowStats(lse, picked, total, lse_low=lse_low, spread=spread, tie=tie), grads


def _as_hidden(rows: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The memory of dh [m, D], read as rows of h's dtype, which takes no more bytes."""
    if rows is None or rows.dtype == dtype:
        return rows
    return rows.view(-1)[: rows.numel() * dtype.itemsize // rows.element_size()].view(dtype).view(rows.shape)


def _lse_of_uncached_columns(head: Head, i: slice, first: int, picked: Tensor) -> Tensor:
    """Base-2 lse [m] of the columns from ``first`` on; their labels are picked."""
    part = slice_head(head, i, slice(first, len(head.w)))
    part = part._replace(y=part.y - first)
    out, lse_only, whole = picked.new_empty(len(part.h)), frozenset({"lse"}), slice(0, len(part.w))
    for j in launches(part, lse_only):
        some = slice_head(part, j, whole)
        s = sweep("stream", some)
        rows, _ = stream(s, some, lse_only, rows_of(picked, j) if part.y.shape[1] else None)
        merge_reference(s, rows, rows_of(out, j), finite=False)
    return out


def _add_uncached_columns(
    head: Head,
    i: slice,
    uncached_columns: list[slice],
    part: Head,
    buffer: Tensor,
    scale: Tensor,
    c: RowGrads,
    rows: RowStats,
    dw: WeightGradient | None,
    dh: Tensor | None,
) -> None:
    """dh [m, D] of a window, and dw of the columns whose exponentials were not kept: their dz is computed again."""
    sums = None if dh is None else NarrowSum(dh, torch.float32)
    for at, to in () if sums is None else sums.pieces(slice(0, len(part.h))):
        gemm(buffer[at, : len(part.w)], part.w, to)
        scale_rows(to, rows_of(scale, at), to, None)
    rebuild(head, i, uncached_columns, buffer, logit_grads(c, rows), rows, dw, sums)


def _exponentials(
    s: Sweep,
    part: Head,
    whole: Head,
    window: Tensor,
    ref2: Tensor,
    picked: Tensor,
    slope: Tensor,
    totals: Tensor,
    logits: Tensor | None,
    level2: Tensor | None,
) -> None:
    """window <- E, relative to a reference that is safe for every row.

    In bfloat16 and float32 the reference is the target logit. In float16, whose range is too small for this, it is the
    level [N] or the target logit, whichever is larger: the lse is above it by at most 11 in base 2 in nearly all rows.
    Token blocks where it turns out too far from the lse are swept again with their lse, which in float16 the totals
    give, as float32 holds them; flags on the device decide, so that the host never waits. Where a float16 head has no
    level, and where logits already lie in the window, which can be swept only once before E overwrites them, the lse
    comes from a sweep of its own and is the reference.
    """
    redo = s.beside("stream")
    labels = map_labels(s, part.y, check=whole is part) if s.labels else None
    lse_only, float16 = frozenset({"lse"}), window.dtype == torch.float16
    if logits is not None or (float16 and level2 is None):
        rows, _ = stream(redo, part, lse_only, None, logits=logits)
        merge_reference(redo, rows, ref2, -float(FLOAT16_SHIFT) if float16 else 0.0)
        exponentials(s, part, window, ref2, picked, slope, totals, labels)
        return
    # the reference reads the row of w of the label, which may lie outside the kept columns
    reference(redo if whole is part else sweep("stream", whole), whole, ref2)
    if level2 is not None:
        torch.maximum(ref2, level2, out=ref2).sub_(LEVEL_SHIFT)
    exponentials(s, part, window, ref2, picked, slope, totals, labels)
    if level2 is None:
        flags = lost = mark_unsafe(s, totals)
        shift = 0.0
    else:
        shift = float(LEVEL_SHIFT)
        flags, lost = rebase_unsafe(s, totals, ref2, LEVEL_TOTALS, shift)
    rows, _ = stream(redo, part, lse_only, None, lost)
    merge_reference(redo, rows, ref2, -shift, lost)
    exponentials(s, part, window, ref2, picked, slope, totals, labels, flags)
