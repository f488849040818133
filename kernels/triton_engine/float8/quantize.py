"""Quantize: w or h in float8, transposed, its rows in the order of the other operand of the product.

    out[d, q] = x[r, d] · weight_r · 448 / top        r the row at place q of its block, top = max |x weight|

in: x [R, D] of two bytes, inner stride 1, weight [R] float32 or None. out: [D, ld] e4m3, ld >= R padded to blocks. FLOP
2RD; bytes: 3RD, and 2RD for `largest`. A float8 product on Hopper sums along the contiguous dimension of both operands.
The gradients sum over classes (x = w) and over tokens (x = h), so both are transposed once. Along the sum they follow
the order in which `gluon.float8_exponentials` stores E8: classes in blocks of 64, tokens in blocks of 128. Entries that
are not finite become NaN, which is what a product with unrounded operands gives for a factor above zero; they do not
count for top.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedhead.kernels.triton_engine.constants import LARGEST_FLOAT8
from fusedhead.kernels.triton_engine.launch.launch import Launch
from fusedhead.kernels.triton_engine.launch.sweep import KEPT
from fusedhead.kernels.triton_engine.launch.tiles import device_of

ROWS, COLUMNS = 128, 64  # the tile that one program transposes
QUANTIZE_PROGRAMS = 8  # programs of `largest` per multiprocessor


@triton.jit
def token_at(q):
    """The token, counted from its block of 128, at place q of a row of E8T."""
    return 64 * ((q // 2) % 2) + 16 * (q // 32) + 8 * (q % 2) + (q // 4) % 8


@triton.jit
def class_at(q):
    """The class, counted from its block of 64, at place q of a row of E8."""
    return 8 * ((q // 2) % 8) + 2 * (q // 16) + q % 2


@triton.jit
def place_of(v):
    """The place in a row of E8 of a class, counted from its block of 64: the inverse of `class_at`."""
    return 16 * ((v // 2) % 4) + 2 * (v // 8) + v % 2


@triton.jit(do_not_specialize=("R", "D"))
def largest_kernel(
    x,  # [R, D]
    weight,  # [R] float32 when WEIGHTED
    out,  # [programs] float32
    R,
    D,
    sx0,
    WEIGHTED: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    """out[p] = the largest finite |x · weight| in every P-th block of rows from p on, for program p of P; 2RD bytes."""
    most = tl.zeros((BR, BD), tl.float32)
    for first in range(tl.program_id(0) * BR, R, tl.num_programs(0) * BR):
        row = first + tl.arange(0, BR)
        factor = tl.full((BR,), 1.0, tl.float32)
        if WEIGHTED:
            factor = tl.abs(tl.load(weight + row, mask=row < R, other=0.0))
        at = x + row.to(tl.int64)[:, None] * sx0
        for d in range(0, D, BD):
            col = d + tl.arange(0, BD)
            values = tl.load(at + col[None, :], mask=(row < R)[:, None] & (col < D)[None, :], other=0.0)
            values = tl.abs(values.to(tl.float32)) * factor[:, None]
            most = tl.maximum(most, tl.where(values < float("inf"), values, 0.0))
    tl.store(out + tl.program_id(0), tl.max(tl.max(most, 1), 0))


@triton.jit(do_not_specialize=("R", "D"))
def transpose_kernel(
    x,  # [R, D]
    weight,  # [R] float32 when WEIGHTED
    top,  # [] float32: the largest |x · weight|
    out,  # [D, ld] e4m3
    R,
    D,
    sx0,
    ld,
    WEIGHTED: tl.constexpr,
    TOKENS: tl.constexpr,  # true: rows are tokens; false: classes
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    """One program per block of BR rows and BD columns; 3RD bytes."""
    q = tl.arange(0, BR)
    if TOKENS:
        row = tl.program_id(0) * BR + token_at(q)
    else:
        row = tl.program_id(0) * BR + q // 64 * 64 + class_at(q % 64)
    col = tl.program_id(1) * BD + tl.arange(0, BD)
    most = tl.load(top)
    factor = tl.zeros((BR,), tl.float32) + tl.where(most > 0.0, LARGEST_FLOAT8 / most, 0.0)
    if WEIGHTED:
        factor *= tl.load(weight + row, mask=row < R, other=0.0)
    at = x + row.to(tl.int64)[:, None] * sx0 + col[None, :]
    values = tl.load(at, mask=(row < R)[:, None] & (col < D)[None, :], other=0.0).to(tl.float32)
    scaled = tl.where(tl.abs(values) < float("inf"), values * factor[:, None], float("nan"))
    place = tl.program_id(0) * BR + q
    to = out + col.to(tl.int64)[:, None] * ld + place[None, :]
    tl.store(to, tl.trans(scaled.to(out.dtype.element_ty)), mask=(col < D)[:, None] & (place < ld)[None, :])


@lru_cache(maxsize=KEPT)
def _largest_launch(device: torch.device, shape: tuple[int, int], stride: int, weighted: bool) -> Launch:
    rows, columns = 8, 512
    programs = min(triton.cdiv(shape[0], rows), device_of(device)[1] * QUANTIZE_PROGRAMS)
    bound = {"R": shape[0], "D": shape[1], "sx0": stride, "WEIGHTED": weighted, "BR": rows, "BD": columns}
    return Launch(largest_kernel, (programs, 1, 1), bound | {"num_warps": 8})


@lru_cache(maxsize=KEPT)
def _transpose_launch(
    device: torch.device, shape: tuple[int, int], stride: int, ld: int, weighted: bool, tokens: bool
) -> Launch:
    grid = triton.cdiv(shape[0], ROWS), triton.cdiv(shape[1], COLUMNS), 1
    bound = {"R": shape[0], "D": shape[1], "sx0": stride, "ld": ld, "WEIGHTED": weighted, "TOKENS": tokens}
    return Launch(transpose_kernel, grid, bound | {"BR": ROWS, "BD": COLUMNS, "num_warps": 8})


def largest(x: Tensor, weight: Tensor | None = None) -> Tensor:
    """The largest finite |x_rd · weight_r|, [] float32."""
    launch = _largest_launch(x.device, x.shape, x.stride(0), weight is not None)  # type: ignore[arg-type]
    found = x.new_empty(launch.grid[0], dtype=torch.float32)
    launch.run(x=x, weight=weight, out=found)
    return found.amax()


def transposed_float8(x: Tensor, top: Tensor, out: Tensor, weight: Tensor | None = None, tokens: bool = False) -> None:
    """out [D, ld] <- x [R, D] · weight · 448 / top in e4m3, in the order of classes, or with ``tokens`` of tokens."""
    launch = _transpose_launch(x.device, x.shape, x.stride(0), out.stride(0), weight is not None, tokens)  # type: ignore[arg-type]
    launch.run(x=x, weight=weight, top=top, out=out)
