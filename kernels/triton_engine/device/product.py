"""The product: one tile of raw logits h @ w.T inside a kernel, the only place that loads operands of the first GEMM.

    acc[BM, BN] = h[block·BM :, :] @ w[tile·BN :, :].T        float32, 2·BM·BN·D FLOP

Inputs: h [N, D], w [V, D] of one floating dtype. They are loaded through TMA descriptors, which the host makes
(`launch.sweep`), or where TMA cannot read them through pointers with any strides; w is never copied, whichever of its
dimensions is contiguous. Rows past the end hold values that the caller has to ignore. With READY cuBLAS has computed
the logits, and the tile is read from the window that the kernel will write.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TMA_CHIPS = (0, 9, 10)  # the interpreter, Hopper, data-centre Blackwell; on 12, pointers spill fewer registers


def tma_ready(x: Tensor) -> bool:
    """True if TMA can read the matrix: inner stride 1, and start and row stride multiples of 16 bytes."""
    return (
        x.stride(1) == 1
        and (x.stride(0) * x.element_size()) % 16 == 0
        and x.stride(0) >= x.shape[1]
        and x.data_ptr() % 16 == 0
        and x.numel() > 0
    )


def reads_rows(w_strides: tuple[int, ...]) -> bool:
    """True if w [V, D] is contiguous along D. Else the descriptor describes its transpose, contiguous along V."""
    return w_strides[1] == 1


def readable_by_tma(h: Tensor, w: Tensor, major: int) -> bool:
    """True if kernels load through TMA on this chip, and TMA can read both matrices without a copy."""
    by_rows = reads_rows(w.stride())
    if major not in TMA_CHIPS or (h.dtype == torch.float32 and not by_rows):
        return False  # tensor cores take float32 operands only if both are contiguous along D
    return tma_ready(h) and tma_ready(w if by_rows else w.t())


@triton.jit
def product(
    h,  # with READY: raw logits [N, V], strides sh0 and 1
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
    READY: tl.constexpr,
    EVEN_D: tl.constexpr,
):
    acc = tl.zeros((BM, BN), tl.float32)
    if READY:
        row = block * BM + tl.arange(0, BM)
        col = tile * BN + tl.arange(0, BN)
        at = h + row.to(tl.int64)[:, None] * sh0 + col[None, :]
        acc = tl.load(at, mask=(row < N)[:, None] & (col < V)[None, :], other=0.0)
    elif TMA:
        for k in range(0, tl.cdiv(D, BK)):
            a = h.load([block * BM, k * BK])
            if W_BY_ROWS:
                acc = tl.dot(a, w.load([tile * BN, k * BK]).T, acc, input_precision="ieee")
            else:
                acc = tl.dot(a, w.load([k * BK, tile * BN]), acc, input_precision="ieee")
    else:
        row = tl.minimum(block * BM + tl.arange(0, BM), N - 1).to(tl.int64)
        col = tl.minimum(tile * BN + tl.arange(0, BN), V - 1).to(tl.int64)
        inner = tl.arange(0, BK)
        h_at = h + row[:, None] * sh0 + inner[None, :] * sh1
        w_at = w + col[None, :] * sw0 + inner[:, None] * sw1
        for k in range(0, tl.cdiv(D, BK)):
            if EVEN_D:  # with a mask whose bound has no known divisor, Triton would load one element at a time
                a = tl.load(h_at)
                b = tl.load(w_at)
            else:
                remaining = D - k * BK
                a = tl.load(h_at, mask=(inner < remaining)[None, :], other=0.0)
                b = tl.load(w_at, mask=(inner < remaining)[:, None], other=0.0)
            acc = tl.dot(a, b, acc, input_precision="ieee")
            h_at += BK * sh1
            w_at += BK * sw1
    return acc


@triton.jit
def _halves(x, BM: tl.constexpr, WIDTH: tl.constexpr):
    return tl.split(tl.permute(tl.reshape(x, (BM, 2, WIDTH // 2)), (0, 2, 1)))


@triton.jit
def column_part(x, J: tl.constexpr, PARTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Part J, from the left, of the 1, 2 or 4 equal column parts of a tile x [BM, BN]."""
    part = x
    if PARTS >= 2:
        left, right = _halves(x, BM, BN)
        part = left if 2 * J < PARTS else right
    if PARTS == 4:
        left, right = _halves(part, BM, BN // 2)
        part = left if J % 2 == 0 else right
    return part
