"""Tile functions that the epilogues of `ring` share: column parts, labels inside a part, and its store to memory.

They do what `device.rows` and `device.product.column_part` do for Triton's kernels. Here the layout is explicit: a tile
stays distributed over the threads as wgmma leaves it, and no function below moves a value to another thread.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma

from fusedhead.kernels.triton_engine.gluon.ring import NARROW, NARROW_TILE, PER_ROW, WIDE, async_store, label_columns

COLUMN_PARTS = gl.constexpr(3)  # column parts of a tile of 192 columns


@gluon.jit
def narrow_parts(acc, BM: gl.constexpr):
    """The wide accumulator [BM, 128] as two parts of 64 columns."""
    split = gl.split(gl.permute(gl.reshape(acc, (BM, 2, WIDE // 2)), (0, 2, 1)))
    left = gl.convert_layout(split[0], NARROW_TILE, assert_trivial=True)
    return left, gl.convert_layout(split[1], NARROW_TILE, assert_trivial=True)


@gluon.jit
def token_rows(block, BM: gl.constexpr):
    """The token indices [BM] int32 of a block."""
    return block * BM + gl.arange(0, BM, layout=PER_ROW)


@gluon.jit
def zero_sums(BM: gl.constexpr):
    """The initial state of an epilogue that keeps one sum a row: zeros [BM]."""
    return (gl.zeros((BM,), gl.float32, layout=PER_ROW),)


@gluon.jit
def columns_of(start, LAYOUT: gl.constexpr, WIDTH: gl.constexpr):
    """The column indices [WIDTH] int32 of a part that starts at ``start``."""
    return start + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, LAYOUT))


@gluon.jit
def store_labelled_part(
    z, labels, place, N, out, LABELS: gl.constexpr, FIRST: gl.constexpr, LAYOUT: gl.constexpr, BM: gl.constexpr,
    BN: gl.constexpr, WIDTH: gl.constexpr,
):  # fmt: skip
    """out[row, k] = z[row, y[row, k]] for the labels in z [BM, WIDTH], the part of a tile that starts at FIRST."""
    if LABELS == 1:
        _store_label(z, place.label_columns, out, 1, 0, place.block, FIRST, LAYOUT, BM, WIDTH)
    else:
        for k in range(labels.K):
            k_at = label_columns(labels, k, place.block, N, place.tile * BN, BM, BN)
            _store_label(z, k_at, out, labels.K, k, place.block, FIRST, LAYOUT, BM, WIDTH)


@gluon.jit
def _store_label(
    z, at, out, K, k, block, FIRST: gl.constexpr, LAYOUT: gl.constexpr, BM: gl.constexpr, WIDTH: gl.constexpr
):
    rows: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    at = gl.convert_layout(at, rows, assert_trivial=True)
    at_label = columns_of(FIRST, LAYOUT, WIDTH)[None, :] == at[:, None]
    row = block * BM + gl.arange(0, BM, layout=rows)
    inside = (at >= FIRST) & (at < FIRST + WIDTH)
    gl.store(out + row.to(gl.int64) * K + k, gl.sum(gl.where(at_label, z, 0.0), 1), mask=inside)


@gluon.jit
def staging(to, BM: gl.constexpr):
    """Shared memory for two parts that are being stored to ``to``."""
    return gl.allocate_shared_memory(to.dtype, [2, BM, NARROW], to.layout)


@gluon.jit
def store_part(values, to, stage, place, J: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr):
    """Stores part J [BM, 64] of a warpgroup's tile, through the half of ``stage`` that the part before did not use."""
    tma.store_wait(1)
    half = stage.index((place.step * COLUMN_PARTS + J) & 1)
    half.store(values.to(to.dtype))
    fence_async_shared()
    async_store(to, [place.block * BM, place.tile * BN + J * NARROW], half)
