"""Exponentials by two warpgroups in turn: E of a window of tokens, as in `sweeps.exponentials`, without a transform.

    E[i, v] = 2^(z·L - ref2_i)      total[i] = Σ_v 2^(z·L - ref2_i)      picked[i, k] = z[i, y_ik]       z = h @ w.T

in: h [M, D], w [V, D] of two bytes, ref2 [M] float32, y [M, K] int64. out: E [M, V] in the dtype of h, partial totals
[size] float32 (`device.schedule`), picked [M, K] float32. Never in memory: z, a float32 window. FLOP 2MDV; bytes: 2MV
written, h and w as in `sweeps.statistics`.
"""

# ruff: noqa: RUF059, SIM102 (Triton needs a name for each part, and each compile-time test as a statement)
from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from fusedhead.kernels.triton_engine.constants import LOG2E
from fusedhead.kernels.triton_engine.device.schedule import partial_offset
from fusedhead.kernels.triton_engine.gluon.ring import (
    NARROW,
    NARROW_TILE,
    PER_ROW,
    LabelPointers,
    Sizes,
    pingpong_program,
)
from fusedhead.kernels.triton_engine.gluon.tile import (
    columns_of,
    narrow_parts,
    staging,
    store_labelled_part,
    store_part,
    token_rows,
    zero_sums,
)


class Exponentials(NamedTuple):
    """What the epilogue reads and writes."""

    E: Any
    stage: Any  # shared memory through which E is stored
    labels: Any
    ref2: Any
    picked: Any
    part: Any


@gluon.jit
def _part(
    z, r, args, place, J: gl.constexpr, sizes,
    LABELS: gl.constexpr, EVEN: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
):  # fmt: skip
    """Stores column part J of a tile of E; returns its row sums."""
    E, stage, labels, picked = args.E, args.stage, args.labels, args.picked
    if LABELS > 0:
        if (place.label_bits >> J) & 1 != 0:
            store_labelled_part(z, labels, place, sizes.N, picked, LABELS, J * NARROW, NARROW_TILE, BM, BN, NARROW)
    e = gl.exp2(gl.fma(z, LOG2E, -r[:, None]))
    if not EVEN:
        start = place.tile * BN + J * NARROW
        if start + NARROW > sizes.V:
            e = gl.where((columns_of(start, NARROW_TILE, NARROW) < sizes.V)[None, :], e, 0.0)
    store_part(e, E, stage, place, J, BM, BN)
    return gl.sum(e, 1)


@gluon.jit
def _epilogue(
    acc, rest, state, args, place, sizes,
    LABELS: gl.constexpr, EVEN: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
):  # fmt: skip
    N, V, _, GROUP, P = sizes
    row = token_rows(place.block, BM)
    r = gl.load(args.ref2 + row, mask=row < N, other=0.0)
    left, right = narrow_parts(acc, BM)
    total = state[0] + _part(left, r, args, place, 0, sizes, LABELS, EVEN, BM, BN)
    total += _part(right, r, args, place, 1, sizes, LABELS, EVEN, BM, BN)
    total += _part(rest, r, args, place, 2, sizes, LABELS, EVEN, BM, BN)
    if place.last:
        to, distance, slots = partial_offset(place.block, place.slot, P, N, V, GROUP, BM, BN)
        gl.store(args.part + to.to(gl.int64) + gl.arange(0, BM, layout=PER_ROW), total)
    return (gl.where(place.last, 0.0, total),)


@gluon.jit(do_not_specialize=("N", "V", "D", "K", "GROUP", "P", "sy0", "sy1"))
def exp_pair_kernel(
    h,  # [M, D] descriptor
    w,  # [V, D] descriptor
    E,  # [M, V] descriptor
    y,  # [M, K] int64
    label_map,  # [token blocks, tiles] int32 (`label_map`), read when LABELS
    flags,  # [token blocks] int32, read when ONLY
    ref2,  # [M] float32
    picked,  # [M, K] float32
    part,  # [size] float32
    N,  # M: the tokens of this window
    V,
    D,
    K,
    GROUP,
    P,  # warpgroups: twice the number of programs, or one less
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
    first = Exponentials(E, staging(E, BM), labels, ref2, picked, part)
    second = Exponentials(E, staging(E, BM), labels, ref2, picked, part)
    pingpong_program(
        _epilogue, zero_sums, first, second, h, w, labels, label_map, flags, Sizes(N, V, D, GROUP, P),
        ONLY, LABELS, EVEN, BM, BN, BK, STAGES,
    )  # fmt: skip
