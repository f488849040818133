"""One tile of raw logits, h @ w.T, inside a kernel: the only place where operands are loaded for the first
GEMM.

    acc[BM, BN] = h[block·BM :, :] @ w[tile·BN :, :].T        float32, 2·BM·BN·D FLOP

Operands come through TMA descriptors (made on the host) where the strides allow it, else through pointers
with any strides; w is read in place whichever of its dimensions is contiguous. Rows past the end give values
that the caller has to ignore. `Operands` is the host's half: what a kernel gets for h and w. Must not know
about softmax.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fusedhead.kernels.triton_tiles import Tile


class Operands(NamedTuple):
    """h [N, D] and w [V, D] for a kernel: descriptors or tensors, four strides, and how to read them."""

    h: Any
    w: Any
    strides: tuple[int, int, int, int]
    TMA: bool
    W_BY_ROWS: bool  # whether the descriptor of w is over [V, D] (else over its transpose [D, V])


def tma_ready(x: Tensor) -> bool:
    """Whether a matrix meets TMA's rules: aligned to 16 bytes, unit inner stride, outer of whole 16 bytes."""
    return (
        x.stride(1) == 1
        and (x.stride(0) * x.element_size()) % 16 == 0
        and x.stride(0) >= x.shape[1]
        and x.data_ptr() % 16 == 0
        and x.numel() > 0
    )


def readable_by_tma(h: Tensor, w: Tensor, major: int) -> bool:
    """Whether the chip has TMA (or is the interpreter, 0) and it can read both matrices as they lie."""
    by_rows = w.stride(1) == 1
    if 1 <= major < 9 or (h.dtype == torch.float32 and not by_rows):
        return False  # the tensor cores read float32 along the hidden size only
    return tma_ready(h) and tma_ready(w if by_rows else w.t())


def operands(h: Tensor, w: Tensor, tile: Tile, tma: bool) -> Operands:
    """Descriptors for TMA, else the tensors themselves for loads through pointers."""
    strides = (h.stride(0), h.stride(1), w.stride(0), w.stride(1))
    if not tma:
        return Operands(h, w, strides, False, True)
    by_rows = w.stride(1) == 1
    view = w if by_rows else w.t()
    block = [tile.BN, tile.BK] if by_rows else [tile.BK, tile.BN]
    h_tiles = TensorDescriptor(h, list(h.shape), list(h.stride()), [tile.BM, tile.BK])
    w_tiles = TensorDescriptor(view, list(view.shape), list(view.stride()), block)
    return Operands(h_tiles, w_tiles, strides, True, by_rows)


@triton.jit
def product(
    h,
    w,
    block,  # token block
    tile,  # vocabulary tile
    N,
    V,
    D,
    sh0,
    sh1,
    sw0,
    sw1,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    TMA: tl.constexpr,
    W_BY_ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    acc = tl.zeros((BM, BN), tl.float32)
    if TMA:
        for k in range(0, tl.cdiv(D, BK)):
            a = h.load([block * BM, k * BK])
            if W_BY_ROWS:
                acc = tl.dot(a, w.load([tile * BN, k * BK]).T, acc, input_precision=PRECISION)
            else:
                acc = tl.dot(a, w.load([k * BK, tile * BN]), acc, input_precision=PRECISION)
    else:
        row = tl.minimum(block * BM + tl.arange(0, BM), N - 1).to(tl.int64)
        col = tl.minimum(tile * BN + tl.arange(0, BN), V - 1).to(tl.int64)
        inner = tl.arange(0, BK)
        h_at = h + row[:, None] * sh0 + inner[None, :] * sh1
        w_at = w + col[None, :] * sw0 + inner[:, None] * sw1
        for k in range(0, tl.cdiv(D, BK)):
            left = D - k * BK
            a = tl.load(h_at, mask=(inner < left)[None, :], other=0.0)
            b = tl.load(w_at, mask=(inner < left)[:, None], other=0.0)
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
            h_at += BK * sh1
            w_at += BK * sw1
    return acc


@triton.jit
def _halves(x, BM: tl.constexpr, WIDTH: tl.constexpr):
    return tl.split(tl.permute(tl.reshape(x, (BM, 2, WIDTH // 2)), (0, 2, 1)))


@triton.jit
def column_part(x, J: tl.constexpr, PARTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Part J of the 1, 2 or 4 equal column parts of a tile x [BM, BN], counted from the left."""
    part = x
    if PARTS >= 2:
        left, right = _halves(x, BM, BN)
        part = left if 2 * J < PARTS else right
    if PARTS == 4:
        left, right = _halves(part, BM, BN // 2)
        part = left if J % 2 == 0 else right
    return part
