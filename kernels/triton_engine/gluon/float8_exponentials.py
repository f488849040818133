"""Float8 exponentials: the sweep of `gluon.exponentials`, which stores its tile twice, in e4m3.

    x[i, v] = 2^(z·L - ref2_i) gain_i        total[i] = Σ_v 2^(z·L - ref2_i)      picked[i, k] = z[i, y_ik]
    E8[i, v] = E8T[v, i] = x if x < 432, else -0             hot[i, tile] bit j: part j of row i may hold a -0

in: h [M, D], w [V, D] bfloat16, ref2, gain [M] float32, y [M, K] int64. out: E8 [M, V] and E8T [V, M] e4m3 (padded),
partial totals [size] and picked [M, K] float32, hot [M, tiles] uint8. Never in memory: z, unrounded exponentials. FLOP
2MDV; bytes: 2MV written, as many as one bfloat16 window has. Two copies, because a float8 product needs both operands
contiguous along its sum. An entry that would round to 448, the largest number of e4m3, is left out and marked by a zero
of negative sign, which changes no product; `float8.list_entries` reads the marks, and these entries are added exactly.

A sum may run in any order that both operands of the product share. So the columns of E8 and the tokens of E8T are
stored in the order in which a thread holds them, 16 and 4 bytes at once (`float8.quantize` orders the other operands in
the same way). Totals are sums of unrounded float32 values, so that float8 does not change the lse.

One warp a scheduler runs an epilogue, so that each of its instructions takes time of its own. Four numbers are rounded
and marked at once, in PTX.
"""

# ruff: noqa: RUF059, SIM102 (Triton wants a name of its own for each part, and tests at compile time as statements)
from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from fusedhead.kernels.triton_engine.constants import LOG2E, SATURATES_FLOAT8
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
    store_labelled_part,
    token_rows,
    zero_sums,
)

# layout of a part [128, 64] whose columns are in the order of E8: a thread holds 16 of them in a row
_BY_ROWS = gl.DistributedLinearLayout(
    reg_bases=[[0, 1], [0, 2], [0, 4], [0, 8], [8, 0], [64, 0]],
    lane_bases=[[0, 16], [0, 32], [1, 0], [2, 0], [4, 0]],
    warp_bases=[[16, 0], [32, 0]],
    block_bases=[],
    shape=[128, 64],
)
# layout of the transposed part [64, 128] whose tokens are in the order of E8T: a thread holds 4 of them in a row
_BY_COLUMNS = gl.DistributedLinearLayout(
    reg_bases=[[0, 1], [0, 2], [1, 0], [8, 0], [16, 0], [32, 0]],
    lane_bases=[[2, 0], [4, 0], [0, 4], [0, 8], [0, 16]],
    warp_bases=[[0, 32], [0, 64]],
    block_bases=[],
    shape=[64, 128],
)
BY_ROWS, BY_COLUMNS = gl.constexpr(_BY_ROWS), gl.constexpr(_BY_COLUMNS)


class Float8Exponentials(NamedTuple):
    """What the epilogue reads and writes."""

    E8: Any
    E8T: Any
    hot: Any
    ld: Any  # elements between rows of E8
    ldt: Any  # elements between rows of E8T
    tiles: Any  # tiles of the vocabulary, the bytes between rows of hot
    labels: Any
    ref2: Any
    gain: Any
    picked: Any
    part: Any


# Four numbers x >= 0 to four bytes of e4m3. What saturates (0x7E) or is NaN (0x7F) becomes -0 (0x80): 2 is added, which
# sets the highest bit of these two bytes alone.
_ROUND = """{
.reg .b16 low, high;
.reg .b32 bytes, marks, rest;
cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
mov.b32 bytes, {low, high};
add.u32 marks, bytes, 0x02020202;
and.b32 marks, marks, 0x80808080;
shr.u32 rest, marks, 7;
sub.u32 rest, marks, rest;
not.b32 rest, rest;
and.b32 bytes, bytes, rest;
or.b32 $0, bytes, marks;
}"""
ROUND = gl.constexpr(_ROUND)


@gluon.jit
def rounded_or_marked(x):
    """The bytes of x >= 0 in e4m3; -0 if x would round to 448 or is NaN."""
    return gl.inline_asm_elementwise(ROUND, "=r,r,r,r,r", [x], dtype=gl.uint8, is_pure=True, pack=4)


@gluon.jit
def _store_rows(x8, E8, ld, block, start, BM: gl.constexpr):
    """E8[block, start :] <- x8 [BM, 64], its columns in the order in which a thread holds them."""
    x = gl.permute(gl.reshape(x8, (BM, 8, 4, 2)), (0, 2, 1, 3))
    x = gl.convert_layout(gl.reshape(x, (BM, NARROW)), BY_ROWS)
    row = gl.arange(0, BM, layout=gl.SliceLayout(1, BY_ROWS))
    col = gl.arange(0, NARROW, layout=gl.SliceLayout(0, BY_ROWS))
    at = (block * BM + row).to(
        gl.int64
    ) * ld + start  # computed for each tile, since the loop over tiles has no register to keep it in
    gl.store(E8 + (at[:, None] + col[None, :]), x)


@gluon.jit
def _store_columns(x8, E8T, ldt, block, start, nought, BM: gl.constexpr):
    """E8T[start :, block] <- x8 [BM, 64] transposed, its tokens in the order in which a thread holds them.

    ``nought`` is 0, which the compiler does not know: it would keep the products below in registers from tile to tile.
    """
    x = gl.permute(gl.reshape(x8, (2, 4, 2, 8, NARROW)), (4, 1, 3, 0, 2))
    x = gl.convert_layout(gl.reshape(x, (NARROW, BM)), BY_COLUMNS)
    col = gl.arange(0, NARROW, layout=gl.SliceLayout(1, BY_COLUMNS))
    row = gl.arange(0, BM, layout=gl.SliceLayout(0, BY_COLUMNS))
    at = (col + nought) * ldt
    gl.store(E8T + (start.to(gl.int64) * ldt + block * BM) + (at[:, None] + row[None, :]), x)


@gluon.jit
def _part(
    z, r, g, args, place, J: gl.constexpr, sizes,
    LABELS: gl.constexpr, EVEN: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
):  # fmt: skip
    """Stores column part J of a tile in E8 and in E8T; returns its row sums, and bit J if the part may hold a -0.

    An entry that is left out makes the row's sum as large, because rounding keeps the order of numbers.
    """
    if LABELS > 0:
        if (place.label_bits >> J) & 1 != 0:
            store_labelled_part(
                z, args.labels, place, sizes.N, args.picked, LABELS, J * NARROW, NARROW_TILE, BM, BN, NARROW
            )
    e = gl.exp2(gl.fma(z, LOG2E, -r[:, None]))
    start = place.tile * BN + J * NARROW
    if not EVEN:
        if start + NARROW > sizes.V:
            e = gl.where((columns_of(start, NARROW_TILE, NARROW) < sizes.V)[None, :], e, 0.0)
    sums = gl.sum(e, 1)  # before the stores, which then have the registers of e
    x8 = rounded_or_marked(e * g[:, None])
    if start < sizes.V:  # also where it is always true: the branch keeps parts apart, which saves registers
        _store_rows(x8, args.E8, args.ld, place.block, start, BM)
        _store_columns(x8, args.E8T, args.ldt, place.block, start, place.label_bits >> 8, BM)
    return sums, gl.where(sums * g < SATURATES_FLOAT8, 0, 1 << J)


@gluon.jit
def _epilogue(
    acc, rest, state, args, place, sizes,
    LABELS: gl.constexpr, EVEN: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
):  # fmt: skip
    N, V, _, GROUP, P = sizes
    row = token_rows(place.block, BM)
    r = gl.load(args.ref2 + row, mask=row < N, other=0.0)
    g = gl.load(args.gain + row, mask=row < N, other=0.0)
    left, right = narrow_parts(acc, BM)
    first, bits = _part(left, r, g, args, place, 0, sizes, LABELS, EVEN, BM, BN)
    second, more = _part(right, r, g, args, place, 1, sizes, LABELS, EVEN, BM, BN)
    bits = bits | more
    third, more = _part(rest, r, g, args, place, 2, sizes, LABELS, EVEN, BM, BN)
    bits = bits | more
    total = state[0] + first
    total += second
    total += third
    gl.store(args.hot + row.to(gl.int64) * args.tiles + place.tile, bits.to(gl.uint8), mask=row < N)
    if place.last:
        to, distance, slots = partial_offset(place.block, place.slot, P, N, V, GROUP, BM, BN)
        gl.store(args.part + to.to(gl.int64) + gl.arange(0, BM, layout=PER_ROW), total)
    return (gl.where(place.last, 0.0, total),)


@gluon.jit(do_not_specialize=("N", "V", "D", "K", "GROUP", "P", "sy0", "sy1", "tiles"))
def float8_exp_pair_kernel(
    h,  # [M, D] descriptor
    w,  # [V, D] descriptor
    E8,  # [token blocks · BM, ld] bytes of e4m3
    E8T,  # [ld, ldt] bytes of e4m3
    hot,  # [M, tiles] uint8
    y,  # [M, K] int64
    label_map,  # [token blocks, tiles] int32 (`label_map`), read when LABELS
    flags,  # [token blocks] int32, read when ONLY
    ref2,  # [M] float32
    gain,  # [M] float32
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
    tiles,
    ld,
    ldt,
    LABELS: gl.constexpr,
    ONLY: gl.constexpr,
    EVEN: gl.constexpr,  # V is a multiple of BN
    BM: gl.constexpr,
    BN: gl.constexpr,
    BK: gl.constexpr,
    STAGES: gl.constexpr,
):
    labels = LabelPointers(y, sy0, sy1, K, 0)
    args = Float8Exponentials(E8, E8T, hot, ld, ldt, tiles, labels, ref2, gain, picked, part)
    pingpong_program(
        _epilogue, zero_sums, args, args, h, w, labels, label_map, flags, Sizes(N, V, D, GROUP, P),
        ONLY, LABELS, EVEN, BM, BN, BK, STAGES,
    )  # fmt: skip
