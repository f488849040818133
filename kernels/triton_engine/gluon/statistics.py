"""Statistics by two warpgroups in turn: lse and picked in one sweep, as in `sweeps.statistics`, without a transform.

    per row: ref2 = max z·L, total = Σ 2^(z·L - ref2), picked[i, k] = z[i, y_ik]        z = h @ w.T

in: h [N, D], w [V, D] of two bytes, y [N, K] int64. out: partial results part [2, size] float32 (`device.schedule`),
picked [N, K] float32. Never in memory: z, p. FLOP 2NDV; bytes as in `sweeps.statistics`.
"""

# ruff: noqa: RUF059, SIM102 (Triton needs a name for each part, and each compile-time test as a statement)
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from fusedhead.kernels.triton_engine.constants import LOG2E
from fusedhead.kernels.triton_engine.device.rows import finite_or_zero
from fusedhead.kernels.triton_engine.device.schedule import partial_offset
from fusedhead.kernels.triton_engine.gluon.ring import (
    NARROW,
    NARROW_TILE,
    PER_ROW,
    PER_ROW_OF_WIDE,
    WIDE,
    WIDE_TILE,
    LabelPointers,
    Sizes,
    pingpong_program,
)
from fusedhead.kernels.triton_engine.gluon.tile import columns_of, store_labelled_part


@gluon.jit
def _existing(z, start, V, LAYOUT: gl.constexpr, WIDTH: gl.constexpr):
    """z, with -inf in the columns past V."""
    return gl.where((columns_of(start, LAYOUT, WIDTH) < V)[None, :], z, float("-inf"))


@gluon.jit
def _exponentials(z, base):
    """Σ_v 2^(z·L - base) over the columns of an accumulator."""
    return gl.sum(gl.exp2(gl.fma(z, LOG2E, -base[:, None])), 1)


@gluon.jit
def _start(BM: gl.constexpr):
    return gl.full((BM,), float("-inf"), gl.float32, layout=PER_ROW), gl.zeros((BM,), gl.float32, layout=PER_ROW)


@gluon.jit
def _epilogue(
    acc, rest, state, args, place, sizes,
    LABELS: gl.constexpr, EVEN: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
):  # fmt: skip
    N, V, _, GROUP, P = sizes
    label_bits, last = place.label_bits, place.last
    labels, picked, part, size = args
    ref2, total = state
    start = place.tile * BN
    if LABELS > 0:
        if label_bits & 3 != 0:
            store_labelled_part(acc, labels, place, N, picked, LABELS, 0, WIDE_TILE, BM, BN, WIDE)
        if label_bits & 4 != 0:
            store_labelled_part(rest, labels, place, N, picked, LABELS, WIDE, NARROW_TILE, BM, BN, NARROW)
    if not EVEN:
        if start + BN > V:
            acc = _existing(acc, start, V, WIDE_TILE, WIDE)
            rest = _existing(rest, start + WIDE, V, NARROW_TILE, NARROW)
    top = gl.maximum(gl.convert_layout(gl.max(acc, 1), PER_ROW, assert_trivial=True), gl.max(rest, 1))
    new = gl.maximum(ref2, top * LOG2E)
    base = finite_or_zero(new)
    fade = gl.exp2(gl.where(gl.abs(ref2) < float("inf"), ref2, base) - base)
    sums = _exponentials(acc, gl.convert_layout(base, PER_ROW_OF_WIDE, assert_trivial=True))
    total = fade * total + gl.convert_layout(sums, PER_ROW, assert_trivial=True) + _exponentials(rest, base)
    if last:
        to, distance, slots = partial_offset(place.block, place.slot, P, N, V, GROUP, BM, BN)
        at = to.to(gl.int64) + gl.arange(0, BM, layout=PER_ROW)
        gl.store(part + at, new)
        gl.store(part + size + at, total)
    return gl.where(last, float("-inf"), new), gl.where(last, 0.0, total)


@gluon.jit(do_not_specialize=("N", "V", "D", "K", "GROUP", "P", "size", "sy0", "sy1"))
def stream_pair_kernel(
    h,  # [N, D] descriptor
    w,  # [V, D] descriptor
    y,  # [N, K] int64
    label_map,  # [token blocks, tiles] int32 (`label_map`), read when LABELS
    flags,  # [token blocks] int32, read when ONLY
    picked,  # [N, K] float32, written where a label lies
    part,  # [2, size] float32: ref2, total
    N,
    V,
    D,
    K,
    GROUP,
    P,  # warpgroups: twice the number of programs, or one less
    size,
    sy0,
    sy1,
    LABELS: gl.constexpr,
    ONLY: gl.constexpr,
    EVEN: gl.constexpr,  # V is a multiple of BN
    BM: gl.constexpr,
    BN: gl.constexpr,
    BK: gl.constexpr,
    STAGES: gl.constexpr,
):
    labels = LabelPointers(y, sy0, sy1, K, 0)
    args = (labels, picked, part, size)
    pingpong_program(
        _epilogue, _start, args, args, h, w, labels, label_map, flags, Sizes(N, V, D, GROUP, P),
        ONLY, LABELS, EVEN, BM, BN, BK, STAGES,
    )  # fmt: skip
