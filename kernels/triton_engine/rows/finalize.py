"""Finalize: the work on each row between the GEMMs of the single pass, without a pass over the window.

It sums a row's partial results, and turns the exponentials E of the row into its gradient by one factor s:

    lse = ref + ln total      a = c_lse + 2 c_square lse      s = a / total      dz = s ⊙ E
    E[i, y] <- c(z_y) (2^(z_y·L - ref2) + c_picked total / a)     the target entry, in float32: as p -> 1 it
                                                                  keeps the digits that p - 1 would lose
    sh[i] = s_i h_i in the dtype of h, for dw = Eᵀ sh             `scale_rows` applies s to dh

in: part [1 or 3, size] float32, E [N, ld], h [N, D], y [N, K], row vectors float32 (below). out: lse and the other row
results [N] float32, the target entries of E, scale [N] float32, sh [N, D]. The target entry is rounded to E's dtype.
With one label a row s absorbs that rounding: the target's gradient, the largest of the row, is exact, and the others
move by less than E's precision. FLOP: ND for sh. Bytes: N · slots · 4 (12 with SUM), and 4ND for sh of two bytes.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedhead.kernels.contract import Head, RowGrads
from fusedhead.kernels.triton_engine.constants import LOG2E, SIGN_BIT
from fusedhead.kernels.triton_engine.device.rows import log_sum, rounded_off, spread_of
from fusedhead.kernels.triton_engine.device.schedule import partial_offset
from fusedhead.kernels.triton_engine.device.transform import row_slope
from fusedhead.kernels.triton_engine.device.vectors import Vectors
from fusedhead.kernels.triton_engine.launch.launch import Launch
from fusedhead.kernels.triton_engine.launch.sweep import KEPT, Sweep


@triton.jit(do_not_specialize=("N", "V", "D", "K", "P", "GROUP", "size", "ld", "sy0", "sy1", "stride_rows"))
def finalize_kernel(
    part,  # [1 or 3, size] float32: totals, Σ u z, Σ u (z·L - ref2)
    ref2,  # [N] float32
    E,  # [N, ld] dtype of h
    h,  # [N, D]
    y,  # [N, K] int64
    rows,  # [R, N] float32
    picked,  # [N, K] float32, transformed target logits
    slope,  # [N, K] float32 when VARYING
    c_lse,  # [N] float32 when HAS_LSE
    c_picked,  # [N, K] float32 when HAS_PICKED, contiguous
    c_square,  # [N] float32 when HAS_SQUARE
    others,  # [N] float32 when OTHERS: base-2 lse of the columns that are not in the window
    lse,  # [N] float32, out
    lse_low,  # [N] float32, out: the rounding error of lse (`device.rows.rounded_off`)
    weight,  # [] float32 when SUM and HAS_U: Σ u
    sum_out,  # [N] float32, out when SUM
    spread_out,  # [N] float32, out when SUM
    scale,  # [N] float32, out: s · (row part of dT/dz); may be the memory of ref2
    sh,  # [N, D] dtype of h, out when NEED_W
    tie,  # [] float32, out: -0.0
    N,
    V,
    D,
    K,
    P,
    GROUP,
    size,
    ld,
    sh0,
    sh1,
    sy0,
    sy1,
    stride_rows,
    STEPS: tl.constexpr,
    LABELS: tl.constexpr,
    VARYING: tl.constexpr,
    HAS_LSE: tl.constexpr,
    HAS_PICKED: tl.constexpr,
    HAS_SQUARE: tl.constexpr,
    OTHERS: tl.constexpr,
    HAS_U: tl.constexpr,
    SUM: tl.constexpr,
    NEED_W: tl.constexpr,
    GAIN: tl.constexpr,  # sh = GAIN s h: a power of two for float16, which alpha of the GEMM for dw takes out again
    LIMIT: tl.constexpr,  # the largest |c_picked total / a| that is stored in E's dtype
    DTYPE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    SLOTS: tl.constexpr,
    INNER: tl.constexpr,
):
    """One program a row."""
    row = tl.program_id(0)
    if row == 0:
        tl.store(tie, tl.full((), SIGN_BIT, tl.int32).to(tl.float32, bitcast=True))  # Triton reads -0.0 as +0.0
    block = row // BM
    start, distance, slots = partial_offset(block, 0, P, N, V, GROUP, BM, BN)
    totals = tl.zeros((SLOTS,), tl.float32)
    sums = tl.zeros((SLOTS,), tl.float32)
    relatives = tl.zeros((SLOTS,), tl.float32)
    for first in range(0, slots, SLOTS):
        slot = first + tl.arange(0, SLOTS)
        at = start.to(tl.int64) + slot.to(tl.int64) * distance + (row - block * BM)
        totals += tl.load(part + at, mask=slot < slots, other=0.0)
        if SUM:
            sums += tl.load(part + size + at, mask=slot < slots, other=0.0)
            relatives += tl.load(part + 2 * size + at, mask=slot < slots, other=0.0)
    total = tl.sum(totals, 0)
    if SUM:
        tl.store(sum_out + row, tl.sum(sums, 0))
        classes = V * 1.0
        if HAS_U:
            classes = tl.load(weight)
        tl.store(spread_out + row, spread_of(total, tl.sum(relatives, 0), classes))
    r = tl.load(ref2 + row)
    lse_row = log_sum(r, total)
    low = rounded_off(r, total, lse_row)
    beyond = 0.0
    if OTHERS:
        o = tl.load(others + row)
        d = o - r
        # beyond 2^100 the window's total, at most 1e18, is lost in rounding: the lse is that of the other columns
        far = d > 100.0
        total += tl.where(d == d, tl.exp2(tl.where(far, 100.0, d)), d)
        lse_row = tl.where(far, log_sum(o, 1.0), log_sum(r, total))
        low = tl.where(far, rounded_off(o, 1.0, lse_row), rounded_off(r, total, lse_row))
        beyond = tl.where(far, d, 0.0)
    tl.store(lse + row, lse_row)
    tl.store(lse_low + row, low)

    a = 0.0
    if HAS_LSE:
        a += tl.load(c_lse + row)
    if HAS_SQUARE:
        a += 2.0 * tl.load(c_square + row) * lse_row
    # NaN if an infinite logit made the total infinite, as log_softmax gives
    s = a / total + 0.0 * total + 0.0 * beyond
    E_row = E + row.to(tl.int64) * ld
    if HAS_PICKED:
        most = 0.0
        for k in range(K):
            most = tl.maximum(most, tl.abs(tl.load(c_picked + row.to(tl.int64) * K + k)))
        # where |c_picked| outweighs |a| so far that the target entry leaves E's range (a = 0 is the extreme), s is
        # raised and the row's exponentials are scaled down by ``keep``
        least = most / LIMIT
        keep = tl.where(tl.abs(s) < least, s / least, 1.0)
        s = tl.where(tl.abs(s) < least, least, s)
        if keep < 1.0:
            for v in range(0, V, 1024):
                at_v = E_row + v + tl.arange(0, 1024)
                inside = v + tl.arange(0, 1024) < V
                e = tl.load(at_v, mask=inside, other=0.0).to(tl.float32)
                tl.store(at_v, (e * keep).to(DTYPE), mask=inside)
            tl.debug_barrier()
        for k in range(K):
            label = tl.load(y + row.to(tl.int64) * sy0 + k * sy1)
            coefficient = 0.0
            for other in range(K):
                same = tl.load(y + row.to(tl.int64) * sy0 + other * sy1) == label
                coefficient += tl.where(same, tl.load(c_picked + row.to(tl.int64) * K + other), 0.0)
            z = tl.load(picked + row.to(tl.int64) * K + k)
            exponential = keep * tl.exp2(tl.fma(z, LOG2E, -r))
            # for a cross-entropy c_picked / a is exactly -1, so that own - total is rounded only once
            share = tl.where(keep < 1.0, coefficient / s, coefficient / a * total)
            entry = exponential + tl.where(coefficient == 0.0, 0.0, share)
            if VARYING:
                entry *= tl.load(slope + row.to(tl.int64) * K + k)
            stored = entry.to(DTYPE)
            if (label >= 0) & (label < V):
                tl.store(E_row + label, stored)
            if (LABELS == 1) & (label >= 0) & (label < V):
                ratio = entry / stored.to(tl.float32)
                s = tl.where((ratio > 0.9) & (ratio < 1.1), s * ratio, s)
    index = row + tl.zeros((1,), tl.int32)
    vectors = Vectors(rows, 0, 0, rows, stride_rows, N)
    s = s * tl.sum(row_slope(vectors, index, STEPS), 0)
    tl.debug_barrier()  # every warp has read ref2, whose memory the scale may overwrite
    tl.store(scale + row, s)
    if NEED_W:
        for d in range(0, D, INNER):
            inner = d + tl.arange(0, INNER)
            x = tl.load(h + row.to(tl.int64) * sh0 + inner * sh1, mask=inner < D, other=0.0)
            tl.store(sh + row.to(tl.int64) * D + inner, (x.to(tl.float32) * (s * GAIN)).to(DTYPE), mask=inner < D)


@lru_cache(maxsize=KEPT)
def _launch(s: Sweep, present: tuple[bool, ...], total: bool, need_w: bool, ld: int, gain: float) -> Launch:
    has_lse, has_picked, has_square, has_others = present
    bound = s.arguments(
        ld=ld,
        VARYING=s.transform.varies_along_row,
        HAS_LSE=has_lse,
        HAS_PICKED=has_picked and s.labels > 0,
        HAS_SQUARE=has_square,
        OTHERS=has_others,
        SUM=total,
        NEED_W=need_w,
        GAIN=gain,
        LIMIT=2.0**14 if s.layout.dtype == torch.float16 else 1e20,
        INNER=1024,
        num_warps=4,
        num_stages=3,
    )
    return Launch(finalize_kernel, (s.n, 1, 1), bound)


def finalize(
    s: Sweep,
    head: Head,
    window: Tensor,
    ref2: Tensor,
    picked: Tensor,
    slope: Tensor,
    part: Tensor,
    coefficients: RowGrads,
    lse: Tensor,
    lse_low: Tensor,
    total: Tensor | None,
    spread: Tensor | None,
    weight: Tensor | None,
    sh: Tensor | None,
    gain: float,
    tie: Tensor,
    other_lse: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """Fill in row results and target entries, tie [] <- -0.0; returns scale [N] float32 with dz = scale ⊙ window.

    The scale overwrites ``ref2``, unless ``scale`` [N] float32 is given by a caller that still reads the reference.
    ``total`` and ``spread`` [N] <- Σ u z and Σ u (lse - z); ``weight`` [] is Σ u, None for u of ones.
    ``other_lse`` [N] float32: the base-2 lse of columns that are not in the window.
    """
    c_lse, c_picked, c_square = coefficients.lse, coefficients.picked, coefficients.square
    present = (c_lse is not None, c_picked is not None, c_square is not None, other_lse is not None)
    scale = ref2 if scale is None else scale
    launch = _launch(s, present, total is not None, sh is not None, window.stride(0), gain)
    launch.run(
        part=part,
        ref2=ref2,
        E=window,
        h=head.h,
        y=head.y,
        rows=head.rows if s.has_rows else None,
        picked=picked,
        slope=slope,
        c_lse=c_lse,
        c_picked=c_picked,
        c_square=c_square,
        others=other_lse,
        lse=lse,
        lse_low=lse_low,
        weight=weight,
        sum_out=total,
        spread_out=spread,
        scale=scale,
        sh=sh,
        tie=tie,
    )
    return scale
