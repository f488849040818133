"""Dlogits by two warpgroups in turn: the gradient of one window's logits, as in `sweeps.dlogits`, without a transform.

    dz = g_lse p + Σ_k g_picked_k [v = y_k],   p = exp(z - lse)        z = h @ w.T

in: h [M, D], w [V', D] of two bytes (the window's slices), y [M, K] int64, g_lse, lse [M], g_picked [M, K] float32.
out: dz [M, V'] in the dtype of h. Never in memory: z, p. FLOP 2MDV'; bytes: 2MV' written, h and w as in
`sweeps.statistics`.
"""

# ruff: noqa: SIM102 (Triton needs each compile-time test as a statement)
from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from fusedhead.kernels.triton_engine.constants import LOG2E
from fusedhead.kernels.triton_engine.gluon.ring import (
    NARROW,
    NARROW_TILE,
    LabelPointers,
    Sizes,
    label_columns,
    pingpong_program,
)
from fusedhead.kernels.triton_engine.gluon.tile import (
    columns_of,
    narrow_parts,
    staging,
    store_part,
    token_rows,
    zero_sums,
)


class Gradients(NamedTuple):
    """What the epilogue reads and writes."""

    dz: Any
    stage: Any  # shared memory through which dz is stored
    labels: Any
    g_lse: Any
    g_picked: Any
    lse: Any
    HAS_LSE: Any


@gluon.jit
def _with_label(d, at, more, FIRST: gl.constexpr):
    """d with ``more`` [BM] added at the tile's column ``at`` [BM]; d is the part of the tile that starts at FIRST."""
    return gl.where(columns_of(FIRST, NARROW_TILE, NARROW)[None, :] == at[:, None], d + more[:, None], d)


@gluon.jit
def _label_gradient(g_picked, at, k, K, row):
    """g_picked[row, k] [BM] if the label lies in the tile (``at`` >= 0), else 0."""
    return gl.load(g_picked + row.to(gl.int64) * K + k, mask=at >= 0, other=0.0)


@gluon.jit
def _part(
    z, norm, g, more, args, place, J: gl.constexpr, sizes, LABELS: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr
):
    """Stores column part J of a tile of dz."""
    dz, stage, labels, g_picked = args.dz, args.stage, args.labels, args.g_picked
    d = gl.zeros((BM, NARROW), gl.float32, layout=NARROW_TILE)
    if args.HAS_LSE:
        d = gl.exp2((z - norm[:, None]) * LOG2E) * g[:, None]
    if LABELS == 1:  # no branch: it would keep d and z in registers at the same time
        d = _with_label(d, place.label_columns, more, J * NARROW)
    elif LABELS == 2:
        if (place.label_bits >> J) & 1 != 0:
            row = token_rows(place.block, BM)
            for k in range(labels.K):
                at = label_columns(labels, k, place.block, sizes.N, place.tile * BN, BM, BN)
                d = _with_label(d, at, _label_gradient(g_picked, at, k, labels.K, row), J * NARROW)
    store_part(d, dz, stage, place, J, BM, BN)


@gluon.jit
def _epilogue(
    acc, rest, state, args, place, sizes,
    LABELS: gl.constexpr, EVEN: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
):  # fmt: skip
    row = token_rows(place.block, BM)
    in_range = row < sizes.N
    norm = gl.load(args.lse + row, mask=in_range, other=0.0)
    norm = norm + 0.0 * norm  # NaN if the lse is infinite, as log_softmax gives
    g = norm
    if args.HAS_LSE:
        g = gl.load(args.g_lse + row, mask=in_range, other=0.0)
    more = norm
    if LABELS == 1:
        more = _label_gradient(args.g_picked, place.label_columns, 0, 1, row)
    left, right = narrow_parts(acc, BM)
    _part(left, norm, g, more, args, place, 0, sizes, LABELS, BM, BN)
    _part(right, norm, g, more, args, place, 1, sizes, LABELS, BM, BN)
    _part(rest, norm, g, more, args, place, 2, sizes, LABELS, BM, BN)
    return state


@gluon.jit(do_not_specialize=("N", "V", "D", "K", "GROUP", "P", "first_col", "sy0", "sy1"))
def dlogits_pair_kernel(
    h,  # [M, D] descriptor
    w,  # [V', D] descriptor
    dz,  # [M, V'] descriptor
    y,  # [M, K] int64, columns of the whole vocabulary
    label_map,  # [token blocks, tiles] int32 (`label_map`), read when LABELS
    g_lse,  # [M] float32 when HAS_LSE
    g_picked,  # [M, K] float32 when LABELS, contiguous
    lse,  # [M] float32
    first_col,
    N,
    V,
    D,
    K,
    GROUP,
    P,  # warpgroups: twice the number of programs, or one less
    sy0,
    sy1,
    LABELS: gl.constexpr,
    HAS_LSE: gl.constexpr,
    EVEN: gl.constexpr,  # V is a multiple of BN
    BM: gl.constexpr,
    BN: gl.constexpr,
    BK: gl.constexpr,
    STAGES: gl.constexpr,
):
    labels = LabelPointers(y, sy0, sy1, K, first_col)
    first = Gradients(dz, staging(dz, BM), labels, g_lse, g_picked, lse, HAS_LSE)
    second = Gradients(dz, staging(dz, BM), labels, g_lse, g_picked, lse, HAS_LSE)
    pingpong_program(
        _epilogue, zero_sums, first, second, h, w, labels, label_map, label_map, Sizes(N, V, D, GROUP, P),
        False, LABELS, EVEN, BM, BN, BK, STAGES,
    )  # fmt: skip
