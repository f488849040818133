"""Dlogits: the gradient of the raw logits of one window, computed from the saved lse in one persistent sweep.

    dz_T = p (g_lse - g_entropy d + g_variance d²) + Σ_k g_picked_k [v = y_k] + g_sum u_v
    p = exp(z - lse - lse_low), d = log p + entropy; g_lse, g_entropy, g_variance: constant, linear, quadratic of
    `contract.LogitGrads`
    dz   = dz_T pulled back through the transform

in: h [M, D], w [V', D] (the window's slices), y [M, K] int64, row gradients, lse, entropy [M] float32. out: dz [M, V']
in the dtype of h; with NEED_COLS, NEED_ROWS partial gradients of the transform's vectors, float32. Never in memory: z,
p, a float32 window. FLOP 2MDV'; bytes: 2MV' written (4MV' in float32), h and w as in `sweeps.statistics`.
"""

# ruff: noqa: SIM102 (a test at compile time stays a statement of its own: `and` would build both sides)
from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedhead.kernels.contract import Head, LogitGrads, RowStats
from fusedhead.kernels.triton_engine.constants import LOG2E
from fusedhead.kernels.triton_engine.device.product import column_part, product
from fusedhead.kernels.triton_engine.device.rows import label_position
from fusedhead.kernels.triton_engine.device.schedule import locate, step_counts
from fusedhead.kernels.triton_engine.device.transform import pulled_back, transform
from fusedhead.kernels.triton_engine.device.vectors import Vectors, prefetch_columns
from fusedhead.kernels.triton_engine.launch.launch import Launch
from fusedhead.kernels.triton_engine.launch.sweep import KEPT, Sweep
from fusedhead.kernels.triton_engine.rows.label_map import labelled_parts, map_labels


@triton.jit
def _add_label(dz, g_picked, y, sy0, sy1, K, k, row, N, start, WIDTH: tl.constexpr):
    at = label_position(y, sy0, sy1, k, row, N, start, WIDTH)
    g = tl.load(g_picked + row.to(tl.int64) * K + k, mask=at >= 0, other=0.0)
    return tl.where(tl.arange(0, WIDTH)[None, :] == at[:, None], dz + g[:, None], dz)


@triton.jit
def _store_vector_parts(
    dz, acc, inside, part_cols, part_rows, vectors, row, col, block, part, rows_size,
    STEPS: tl.constexpr, J: tl.constexpr, NEED_COLS: tl.constexpr, NEED_ROWS: tl.constexpr,
    PRECISE: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """This tile's share of the gradient of the vector of step J: Σ over rows or columns of g or g·z."""
    op: tl.constexpr = STEPS[2 * J]
    V = vectors.V
    N = vectors.N
    along_v: tl.constexpr = NEED_COLS and (op == "addcol" or op == "mulcol")
    along_n: tl.constexpr = NEED_ROWS and (op == "addrow" or op == "mulrow")
    if along_v or along_n:
        g = pulled_back(dz, acc, vectors, col, row, STEPS, J + 1, PRECISE)
        if op == "mulcol" or op == "mulrow":
            g *= transform(acc, vectors, col, row, STEPS, J, PRECISE)
        g = tl.where(inside, g, 0.0)
        if along_v:
            to = part_cols + (J * tl.cdiv(N, BM) + block).to(tl.int64) * V + col
            tl.store(to, tl.sum(g, 0), mask=col < V)
        else:
            to = part_rows + (J * rows_size + part).to(tl.int64) * N + row
            tl.store(to, tl.sum(g, 1), mask=row < N)


@triton.jit
def _epilogue(
    acc,
    dz_out,
    y,
    u,
    vectors,
    g_lse,
    g_picked,
    g_sum,
    g_entropy,
    g_variance,
    lse,
    lse_low,
    entropy,
    part_cols,
    part_rows,
    block,
    part,  # the index of this column part in the window
    here,  # not 0 if the part holds a label
    first_col,  # the vocabulary's column at which the window starts
    sy0,
    sy1,
    K,
    rows_size,
    STEPS: tl.constexpr,
    LABELS: tl.constexpr,
    HAS_LSE: tl.constexpr,
    HAS_SUM: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_VARIANCE: tl.constexpr,
    HAS_U: tl.constexpr,
    NEED_COLS: tl.constexpr,
    NEED_ROWS: tl.constexpr,
    PRECISE: tl.constexpr,
    DTYPE: tl.constexpr,
    BM: tl.constexpr,
    WIDTH: tl.constexpr,
):
    V = vectors.V
    N = vectors.N
    start = part * WIDTH
    row = block * BM + tl.arange(0, BM)
    col = start + tl.arange(0, WIDTH)
    in_range = row < N
    z = transform(acc, vectors, col, row, STEPS, len(STEPS) // 2, PRECISE)
    dz = tl.zeros((BM, WIDTH), tl.float32)
    if HAS_LSE or HAS_ENTROPY:
        norm = tl.load(lse + row, mask=in_range, other=0.0)
        logp = z - (norm + 0.0 * norm)[:, None]  # NaN if the lse is infinite, as log_softmax gives
        if PRECISE:  # bfloat16 and float16 round off far more than lse_low
            logp -= tl.load(lse_low + row, mask=in_range, other=0.0)[:, None]
        p = tl.exp2(logp * LOG2E)
        if HAS_LSE:
            dz = p * tl.load(g_lse + row, mask=in_range, other=0.0)[:, None]
        if HAS_ENTROPY:
            H = tl.load(entropy + row, mask=in_range, other=0.0)
            dz -= tl.load(g_entropy + row, mask=in_range, other=0.0)[:, None] * (p * (logp + H[:, None]))
            if HAS_VARIANCE:
                d = logp + H[:, None]
                dz += tl.load(g_variance + row, mask=in_range, other=0.0)[:, None] * (p * (d * d))
    if HAS_SUM:
        g = tl.load(g_sum + row, mask=in_range, other=0.0)
        if HAS_U:
            dz += g[:, None] * tl.load(u + col, mask=col < V, other=0.0)[None, :]
        else:
            dz += g[:, None]
    if LABELS > 0:
        if here != 0:
            if LABELS == 1:
                dz = _add_label(dz, g_picked, y, sy0, sy1, K, 0, row, N, first_col + start, WIDTH)
            else:
                for k in range(K):
                    dz = _add_label(dz, g_picked, y, sy0, sy1, K, k, row, N, first_col + start, WIDTH)
    if NEED_COLS or NEED_ROWS:
        inside = (row < N)[:, None] & (col < V)[None, :]
        for j in tl.static_range(len(STEPS) // 2):
            _store_vector_parts(
                dz, acc, inside, part_cols, part_rows, vectors, row, col, block, part, rows_size,
                STEPS, j, NEED_COLS, NEED_ROWS, PRECISE, BM,
            )  # fmt: skip
    dz = pulled_back(dz, acc, vectors, col, row, STEPS, 0, PRECISE)
    dz_out.store([block * BM, start], dz.to(DTYPE))


@triton.jit(
    do_not_specialize=(
        "N", "V", "D", "K", "GROUP", "first_col", "rows_size", "sy0", "sy1", "stride_cols", "stride_rows"
    )
)  # fmt: skip
def dlogits_kernel(
    h,
    w,
    dz,  # [M, V'] descriptor
    y,  # [M, K] int64, columns of the whole vocabulary
    label_map,  # [token blocks, tiles] int32 (`label_map`), read when LABELS
    u,  # [V'] float32 when HAS_U
    cols,  # [C, V'] float32
    rows,  # [R, M] float32
    g_lse,  # [M] float32 when HAS_LSE
    g_picked,  # [M, K] float32 when LABELS, contiguous
    g_sum,  # [M] float32 when HAS_SUM
    g_entropy,  # [M] float32 when HAS_ENTROPY
    g_variance,  # [M] float32 when HAS_VARIANCE, only with HAS_ENTROPY
    lse,  # [M] float32
    lse_low,  # [M] float32, read when PRECISE
    entropy,  # [M] float32 when HAS_ENTROPY
    part_cols,  # [steps, token blocks, V'] float32, out when NEED_COLS
    part_rows,  # [steps, rows_size, M] float32, out when NEED_ROWS
    first_col,
    N,
    V,
    D,
    K,
    GROUP,
    rows_size,  # column parts of the window
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
    HAS_LSE: tl.constexpr,
    HAS_SUM: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_VARIANCE: tl.constexpr,
    HAS_U: tl.constexpr,
    NEED_COLS: tl.constexpr,
    NEED_ROWS: tl.constexpr,
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
    pid = tl.program_id(0)
    P = tl.num_programs(0)
    vectors = Vectors(cols, stride_cols, V, rows, stride_rows, N)
    main_steps, steps = step_counts(pid, P, N, V, GROUP, BM, BN)
    for step in tl.range(0, steps, flatten=FLATTEN):
        block, tile, _, _ = locate(step, main_steps, pid, P, N, V, GROUP, BM, BN)
        label_bits = labelled_parts(label_map, block, tile, V, LABELS, BN)
        prefetch_columns(vectors, tile * BN + tl.arange(0, BN), STEPS, PREFETCH)
        acc = product(
            h, w, block, tile, N, V, D, sh0, sh1, sw0, sw1, BM, BN, BK, TMA, W_BY_ROWS, READY, EVEN_D
        )
        for j in tl.static_range(PARTS):
            x = column_part(acc, j, PARTS, BM, BN)
            _epilogue(
                x, dz, y, u, vectors, g_lse, g_picked, g_sum, g_entropy, g_variance, lse, lse_low, entropy,
                part_cols, part_rows, block, PARTS * tile + j, (label_bits >> j) & 1, first_col, sy0, sy1, K, rows_size,
                STEPS, LABELS, HAS_LSE, HAS_SUM, HAS_ENTROPY, HAS_VARIANCE, HAS_U, NEED_COLS, NEED_ROWS, PRECISE,
                DTYPE, BM, BN // PARTS,
            )  # fmt: skip


@lru_cache(maxsize=KEPT)
def _launch(s: Sweep, present: tuple[bool, ...], need_cols: bool, need_rows: bool) -> Launch:
    has_lse, has_entropy, has_variance, has_picked, has_sum = present
    if s.tile.paired:
        from fusedhead.kernels.triton_engine.gluon.dlogits import dlogits_pair_kernel  # only where Gluon runs

        return s.launch(dlogits_pair_kernel, LABELS=s.labels if has_picked else 0, HAS_LSE=has_lse)
    return s.launch(
        dlogits_kernel,
        LABELS=s.labels if has_picked else 0,
        HAS_LSE=has_lse,
        HAS_SUM=has_sum,
        HAS_ENTROPY=has_entropy,
        HAS_VARIANCE=has_variance,
        NEED_COLS=need_cols,
        NEED_ROWS=need_rows,
        rows_size=_column_parts(s),
    )


def _column_parts(s: Sweep) -> int:
    """The number of column parts of all tiles of the window."""
    return -(-s.vocab // s.tile.BN) * s.tile.parts


def dlogits(
    s: Sweep,
    head: Head,
    window: Tensor,
    grads: LogitGrads,
    stats: RowStats,
    first_col: int,
    need_cols: bool,
    need_rows: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """window [N, ld] <- dz; returns partial sums of the needed vectors' gradients [steps, ., V], [steps, ., N]."""
    h, w, y, cols, rows, u, _ = head
    lse, low, steps = stats.lse, None, len(s.steps) // 2
    part_cols = lse.new_empty((steps, s.schedule.blocks, s.vocab)) if need_cols else None
    part_rows = lse.new_empty((steps, _column_parts(s), s.n)) if need_rows else None
    g_lse, g_entropy, g_variance, g_picked, g_sum = grads
    if h.dtype == torch.float32:  # the kernel reads it with PRECISE alone
        low = torch.zeros_like(lse) if stats.lse_low is None else stats.lse_low
    h_tiles, w_tiles = s.operands(h, w, window)
    _launch(s, tuple(g is not None for g in grads), need_cols, need_rows).run(
        h=h_tiles,
        w=w_tiles,
        dz=s.window(window),
        y=y,
        label_map=None if g_picked is None else map_labels(s, y, first_col),
        u=u if s.has_u else None,
        cols=cols if s.has_cols else None,
        rows=rows if s.has_rows else None,
        g_lse=g_lse,
        g_picked=g_picked,
        g_sum=g_sum,
        g_entropy=g_entropy,
        g_variance=g_variance,
        lse=lse,
        lse_low=low,
        entropy=None if g_entropy is None else stats.entropy,
        part_cols=part_cols,
        part_rows=part_rows,
        first_col=first_col,
    )
    return part_cols, part_rows
