"""Exponentials: the first GEMM of the single pass, one persistent sweep that stores E of a window of tokens.

    E[i, v] = 2^(z·L - ref2_i) · c(z)        z = T(h @ w.T), c the factor of dT/dz that varies along a row, or 1
    total[i] = Σ_v 2^(z·L - ref2_i)          of float32 values, before E is rounded
    Σ_v u_v z, Σ_v u_v (z·L - ref2_i)        with SUM
    picked[i, k] = z[i, y_ik], slope[i, k] = c at that entry, both float32

in: h [M, D], w [V, D] of one floating dtype, ref2 [M] float32, y [M, K] int64, the transform's vectors and u float32.
out: E [M, V] in the dtype of h (padded rows), partial totals part [1 or 3, size] float32, picked and slope [M, K].
Never in memory: z, p, a float32 window. FLOP 2MDV; bytes: 2MV written (4MV in float32), h and w as in
`sweeps.statistics`. Since exponentials are stored and not logits, no elementwise pass over [M, V] follows: dh = s ⊙ (E
w) and dw = Eᵀ (s ⊙ h) are plain GEMMs, with s = coefficient / total a row (the scaled exponentials of Dao-AILab/quack,
with one reference a row).

With ONLY the sweep covers only the token blocks that ``flags`` marks, and returns at once if there are none.
"""

# ruff: noqa: SIM102 (a test at compile time stays a statement of its own: `and` would build both sides)
from __future__ import annotations

from functools import lru_cache

import triton
import triton.language as tl
from torch import Tensor

from fusedhead.kernels.contract import Head
from fusedhead.kernels.triton_engine.constants import LOG2E
from fusedhead.kernels.triton_engine.device.product import column_part, product
from fusedhead.kernels.triton_engine.device.rows import class_weights, laid_out_as, store_labelled, weighted_sum
from fusedhead.kernels.triton_engine.device.schedule import any_marked, locate, partial_offset, step_counts
from fusedhead.kernels.triton_engine.device.transform import column_slope, transform
from fusedhead.kernels.triton_engine.device.vectors import Vectors, prefetch, prefetch_columns
from fusedhead.kernels.triton_engine.launch.launch import Launch
from fusedhead.kernels.triton_engine.launch.sweep import KEPT, Sweep
from fusedhead.kernels.triton_engine.rows.label_map import labelled_parts


@triton.jit
def _epilogue(
    acc,
    ref2,
    E,
    y,
    u,
    vectors,
    picked,
    slope,
    block,
    start,  # the first column of this part
    here,  # not 0 if the part holds a label
    sy0,
    sy1,
    K,
    STEPS: tl.constexpr,
    LABELS: tl.constexpr,
    HAS_U: tl.constexpr,
    SUM: tl.constexpr,
    VARYING: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISE: tl.constexpr,
    DTYPE: tl.constexpr,
    BM: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Stores one column part of a tile of E; returns its row sums of the exponentials, of u z and of u (z·L - ref2)."""
    V = vectors.V
    N = vectors.N
    row = block * BM + tl.arange(0, BM)
    col = start + tl.arange(0, WIDTH)
    z = transform(acc, vectors, col, row, STEPS, len(STEPS) // 2, PRECISE)
    if VARYING:
        c = column_slope(acc, vectors, col, row, STEPS, PRECISE)
        if LABELS > 0:
            if here != 0:
                store_labelled(z, y, sy0, sy1, K, row, N, start, picked, LABELS, WIDTH)
                store_labelled(laid_out_as(c, z), y, sy0, sy1, K, row, N, start, slope, LABELS, WIDTH)
    exponent = tl.fma(z, LOG2E, -ref2[:, None])
    e = tl.exp2(exponent)
    if not EVEN:
        if start + WIDTH > V:
            e = tl.where((col < V)[None, :], e, 0.0)
    total = tl.sum(e, 1)
    weighted = tl.zeros((BM,), tl.float32)
    relative = tl.zeros((BM,), tl.float32)
    if SUM:
        classes = class_weights(u, col, V, HAS_U, WIDTH)
        weighted = weighted_sum(z, classes, col, V)
        relative = weighted_sum(exponent, classes, col, V)
    if LABELS > 0 and not VARYING:
        if here != 0:
            store_labelled(z, y, sy0, sy1, K, row, N, start, picked, LABELS, WIDTH)
    if VARYING:
        e = e * c
    E.store([block * BM, start], e.to(DTYPE))
    return total, weighted, relative


@triton.jit(do_not_specialize=("N", "V", "D", "K", "GROUP", "size", "sy0", "sy1", "stride_cols", "stride_rows"))
def exp_kernel(
    h,
    w,
    E,  # [M, V] descriptor
    y,  # [M, K] int64
    label_map,  # [token blocks, tiles] int32 (`label_map`), read when LABELS
    u,  # [V] float32 when HAS_U
    cols,
    rows,
    flags,  # [token blocks] int32, read when ONLY
    ref2,  # [M] float32
    picked,  # [M, K] float32
    slope,  # [M, K] float32 when VARYING
    part,  # [1 or 3, size] float32: total, Σ u z, Σ u (z·L - ref2)
    N,  # M: the tokens of this window
    V,
    D,
    K,
    GROUP,
    size,
    sh0,
    sh1,
    sw0,
    sw1,
    sy0,
    sy1,
    stride_cols,
    stride_rows,
    STEPS: tl.constexpr,
    LABELS: tl.constexpr,
    HAS_U: tl.constexpr,
    SUM: tl.constexpr,
    VARYING: tl.constexpr,
    ONLY: tl.constexpr,
    EVEN: tl.constexpr,  # V is a multiple of BN
    PRECISE: tl.constexpr,
    DTYPE: tl.constexpr,
    TMA: tl.constexpr,
    W_BY_ROWS: tl.constexpr,
    READY: tl.constexpr,
    EVEN_D: tl.constexpr,  # D is a multiple of BK
    PREFETCH: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    FLATTEN: tl.constexpr,
    PARTS: tl.constexpr,  # 1, 2 or 4 column parts, stored one after the other
):
    LATE: tl.constexpr = VARYING or SUM  # load ref2 after the product: these epilogues need its registers
    pid = tl.program_id(0)
    P = tl.num_programs(0)
    vectors = Vectors(cols, stride_cols, V, rows, stride_rows, N)
    main_steps, steps = step_counts(pid, P, N, V, GROUP, BM, BN)
    if ONLY:
        steps = tl.where(any_marked(flags, tl.cdiv(N, BM), tl.arange(0, 128)), steps, 0)

    total = tl.zeros((BM,), tl.float32)
    weighted = tl.zeros((BM,), tl.float32)
    relative = tl.zeros((BM,), tl.float32)
    for step in tl.range(0, steps, flatten=FLATTEN):
        block, tile, slot, last = locate(step, main_steps, pid, P, N, V, GROUP, BM, BN)
        live = 1
        if ONLY:
            live = tl.load(flags + block)
        if live != 0:
            row = block * BM + tl.arange(0, BM)
            label_bits = labelled_parts(label_map, block, tile, V, LABELS, BN)
            if LATE:
                prefetch(ref2 + tl.minimum(row, N - 1), PREFETCH)
            else:
                r = tl.load(ref2 + row, mask=row < N, other=0.0)
            prefetch_columns(vectors, tile * BN + tl.arange(0, BN), STEPS, PREFETCH)
            acc = product(
                h, w, block, tile, N, V, D, sh0, sh1, sw0, sw1, BM, BN, BK, TMA, W_BY_ROWS, READY, EVEN_D
            )
            if LATE:
                r = tl.load(ref2 + row, mask=row < N, other=0.0)
            for j in tl.static_range(PARTS):
                x = column_part(acc, j, PARTS, BM, BN)
                start = tile * BN + j * (BN // PARTS)
                t, s, q = _epilogue(
                    x, r, E, y, u, vectors, picked, slope, block, start, (label_bits >> j) & 1, sy0, sy1, K, STEPS,
                    LABELS, HAS_U, SUM, VARYING, EVEN, PRECISE, DTYPE, BM, BN // PARTS,
                )  # fmt: skip
                total += t
                weighted += s
                relative += q
        if last:
            if live != 0:
                start, _, _ = partial_offset(block, slot, P, N, V, GROUP, BM, BN)
                to = start.to(tl.int64) + tl.arange(0, BM)
                tl.store(part + to, total)
                if SUM:
                    tl.store(part + size + to, weighted)
                    tl.store(part + 2 * size + to, relative)
        # selects and not a branch: Triton does not flatten a loop that holds a branch with results
        total = tl.where(last, 0.0, total)
        weighted = tl.where(last, 0.0, weighted)
        relative = tl.where(last, 0.0, relative)


@lru_cache(maxsize=KEPT)
def _launch(s: Sweep, total: bool, only: bool) -> Launch:
    if s.tile.paired:
        from fusedhead.kernels.triton_engine.gluon.exponentials import (
            exp_pair_kernel,  # only where Gluon runs
        )

        return s.launch(exp_pair_kernel, ONLY=only)
    options = {"FLATTEN": False} if only else {}
    varying = s.transform.varies_along_row
    return s.launch(exp_kernel, SUM=total, VARYING=varying, ONLY=only, **options)


def exponentials(
    s: Sweep,
    head: Head,
    window: Tensor,
    ref2: Tensor,
    picked: Tensor,
    slope: Tensor,
    part: Tensor,
    label_map: Tensor | None,
    flags: Tensor | None = None,
) -> None:
    """window [N, ld] <- E; part [1 or 3, size] <- totals (and both sums); picked, slope [N, K] <- values at labels."""
    h, w, y, cols, rows, u, _ = head
    launch = _launch(s, part.shape[0] == 3, flags is not None)
    h_tiles, w_tiles = s.operands(h, w, window)
    launch.run(
        h=h_tiles,
        w=w_tiles,
        E=s.window(window),
        y=y,
        label_map=label_map,
        u=u if s.has_u else None,
        cols=cols if s.has_cols else None,
        rows=rows if s.has_rows else None,
        flags=flags,
        ref2=ref2,
        picked=picked,
        slope=slope,
        part=part,
    )
