"""The exponentials of a window of tokens in float8, twice: `gluon.exponentials` whose stored tile is e4m3.

    x[i, v] = 2^(z·L - ref2_i)        total[i] = Σ_v x[i, v]        picked[i, k] = z[i, y_ik]
    E8[i, v] = E8T[v, i] = x where it rounds to less than 448, else -0
    hot[i, tile] bit j: part j of row i may hold a -0

in: h [M, D], w [V, D], ref2 [M] float32. out: E8 [M, V] and E8T [V, M] e4m3, partial totals, picked, hot. A float8
product wants both operands contiguous along the sum, hence two copies: 2 bytes an element, as many as one bfloat16
window has. Entries too large for the tail are left out and marked by the sign of their zero, which no product sees:
whoever reads the marks adds them exactly (`float8.list_entries`).

The order along a sum is free as long as both operands of a product share it. So columns of E8 and tokens of E8T lie as
a thread holds them (`float8.quantize` has the same order): a thread stores 16 and 4 bytes at once, straight from its
registers. Totals are taken from unrounded float32 values: the lse does not know of float8.

One warp a scheduler runs an epilogue, so that its instructions count one by one: an epilogue that takes longer than the
other group's product shows in the sweep's time.
"""

# ruff: noqa: RUF059, SIM102 (Triton wants a name of its own for each part, and tests at compile time as statements)
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
    store_labelled_part,
    token_rows,
    zero_sums,
)

# how threads hold a part [128, 64] once its columns lie in the order of E8: 16 of them in a row
_BY_ROWS = gl.DistributedLinearLayout(
    reg_bases=[[0, 1], [0, 2], [0, 4], [0, 8], [8, 0], [64, 0]],
    lane_bases=[[0, 16], [0, 32], [1, 0], [2, 0], [4, 0]],
    warp_bases=[[16, 0], [32, 0]],
    block_bases=[],
    shape=[128, 64],
)
# the same part as [64, 128], its tokens in the order of E8T: 4 of them in a row
_BY_COLUMNS = gl.DistributedLinearLayout(
    reg_bases=[[0, 1], [0, 2], [1, 0], [8, 0], [16, 0], [32, 0]],
    lane_bases=[[2, 0], [4, 0], [0, 4], [0, 8], [0, 16]],
    warp_bases=[[0, 32], [0, 64]],
    block_bases=[],
    shape=[64, 128],
)
BY_ROWS, BY_COLUMNS = gl.constexpr(_BY_ROWS), gl.constexpr(_BY_COLUMNS)


class Float8Exponentials(NamedTuple):
    """What an epilogue reads and writes."""

    E8: Any
    E8T: Any
    hot: Any
    ld: Any  # elements between rows of E8
    ldt: Any  # elements between rows of E8T
    tiles: Any  # of the vocabulary: bytes between rows of hot
    labels: Any
    ref2: Any
    picked: Any
    part: Any


# Four numbers x >= 0 to four bytes e4m3: what saturates (0x7E) or is no number (0x7F) becomes -0 (0x80).
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
SATURATED = gl.constexpr(432.0)  # the least number that rounds to 448, the largest of e4m3


@gluon.jit
def rounded_or_marked(x):
    """The bytes of x in e4m3, -0 where x is too large."""
    return gl.inline_asm_elementwise(ROUND, "=r,r,r,r,r", [x], dtype=gl.uint8, is_pure=True, pack=4)


@gluon.jit
def _store_rows(x8, E8, ld, block, start, BM: gl.constexpr):
    """E8[block, start :] <- x8 [BM, 64], columns in the order of threads."""
    x = gl.permute(gl.reshape(x8, (BM, 8, 4, 2)), (0, 2, 1, 3))
    x = gl.convert_layout(gl.reshape(x, (BM, NARROW)), BY_ROWS)
    row = gl.arange(0, BM, layout=gl.SliceLayout(1, BY_ROWS))
    col = gl.arange(0, NARROW, layout=gl.SliceLayout(0, BY_ROWS))
    at = (block * BM + row).to(gl.int64) * ld + start  # anew for each tile: a loop over tiles has no registers for it
    gl.store(E8 + (at[:, None] + col[None, :]), x)


@gluon.jit
def _store_columns(x8, E8T, ldt, block, start, nought, BM: gl.constexpr):
    """E8T[start :, block] <- x8 [BM, 64] transposed, tokens in the order of threads. ``nought`` is 0, unknown to the
    compiler: it would keep the products below in registers from tile to tile."""
    x = gl.permute(gl.reshape(x8, (2, 4, 2, 8, NARROW)), (4, 1, 3, 0, 2))
    x = gl.convert_layout(gl.reshape(x, (NARROW, BM)), BY_COLUMNS)
    col = gl.arange(0, NARROW, layout=gl.SliceLayout(1, BY_COLUMNS))
    row = gl.arange(0, BM, layout=gl.SliceLayout(0, BY_COLUMNS))
    at = (col + nought) * ldt
    gl.store(E8T + (start.to(gl.int64) * ldt + block * BM) + (at[:, None] + row[None, :]), x)


@gluon.jit
def _part(
    z, r, args, place, J: gl.constexpr, sizes,
    LABELS: gl.constexpr, EVEN: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
):  # fmt: skip
    """Stores part J of a tile twice; returns its row sums, and bit J where one of a row's entries may be too large."""
    if LABELS > 0:
        if (place.label_bits >> J) & 1 != 0:
            store_labelled_part(
                z, args.labels, place, sizes.N, args.picked, LABELS, J * NARROW, NARROW_TILE, BM, BN, NARROW
            )
    x = gl.exp2(gl.fma(z, LOG2E, -r[:, None]))
    start = place.tile * BN + J * NARROW
    if not EVEN:
        if start + NARROW > sizes.V:
            x = gl.where((columns_of(start, NARROW_TILE, NARROW) < sizes.V)[None, :], x, 0.0)
    sums = gl.sum(x, 1)  # before the stores: the registers of x are free then
    x8 = rounded_or_marked(x)
    if start < sizes.V:  # where it always is, too: a part on its own needs fewer registers
        _store_rows(x8, args.E8, args.ld, place.block, start, BM)
        _store_columns(x8, args.E8T, args.ldt, place.block, start, place.label_bits >> 8, BM)
    return sums, gl.where(sums < SATURATED, 0, 1 << J)  # a sum of rounded numbers is no less than each of them


@gluon.jit
def _epilogue(
    acc, rest, state, args, place, sizes,
    LABELS: gl.constexpr, EVEN: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
):  # fmt: skip
    N, V, _, GROUP, P = sizes
    row = token_rows(place.block, BM)
    # past the last token: exponentials that are 0
    r = gl.load(args.ref2 + row, mask=row < N, other=float("inf"))
    left, right = narrow_parts(acc, BM)
    first, bits = _part(left, r, args, place, 0, sizes, LABELS, EVEN, BM, BN)
    second, more = _part(right, r, args, place, 1, sizes, LABELS, EVEN, BM, BN)
    bits = bits | more
    third, more = _part(rest, r, args, place, 2, sizes, LABELS, EVEN, BM, BN)
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
    E8,  # [token blocks · BM, ld] bytes
    E8T,  # [ld, ldt] bytes
    hot,  # [M, tiles] uint8
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
    P,  # twice as many as programs, or one less
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
    args = Float8Exponentials(E8, E8T, hot, ld, ldt, tiles, labels, ref2, picked, part)
    pingpong_program(
        _epilogue, zero_sums, args, args, h, w, labels, label_map, flags, Sizes(N, V, D, GROUP, P),
        ONLY, LABELS, EVEN, BM, BN, BK, STAGES,
    )  # fmt: skip
