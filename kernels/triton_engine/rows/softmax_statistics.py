"""Softmax statistics: the largest logit of each row and the logarithm of the sum of its exponentials, in one pass.

    top[i] = a max_v z[i, v]        log_total[i] = log Σ_v exp(a z[i, v] - top[i])        for one or two a > 0

in: z [n, V] of two bytes, rows contiguous. out: [2 or 4, n] float32. Bytes: 2nV. A program takes a row; each of its
lanes has a maximum of its own, so that only the end of a row needs other threads (the recurrence is that of the online
softmax, Milakov and Gimelshein, 2018). Rows that hold NaN or inf, or nothing above -inf, get a log_total of NaN.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedhead.kernels.triton_engine.constants import LOG2E
from fusedhead.kernels.triton_engine.device.rows import finite_or_zero
from fusedhead.kernels.triton_engine.launch.launch import Launch, on_device
from fusedhead.kernels.triton_engine.launch.sweep import KEPT

ROW_LANES, ROW_DEPTH = (
    2048,
    4,
)  # a program reads ROW_DEPTH values of each lane at a time; 8 warps load 16 bytes a thread
ALIGNED = 16  # rows of the result begin at multiples of this


@triton.jit
def _step(z, top, total, second, a2, b2, BOTH: tl.constexpr):
    """The statistics of the lanes with the values z [DEPTH, LANES] added."""
    new = tl.maximum(top, tl.max(z, 0))
    base = finite_or_zero(new)
    away = z - base[None, :]
    fade = top - base
    total = total * tl.exp2(fade * a2) + tl.sum(tl.exp2(away * a2), 0)
    if BOTH:
        second = second * tl.exp2(fade * b2) + tl.sum(tl.exp2(away * b2), 0)
    return new, total, second


@triton.jit(do_not_specialize=("width", "a", "b"))  # not V and distance: 16 bytes are loaded at once if they allow it
def softmax_statistics_kernel(
    z,  # [n, V] of two bytes
    out,  # [2 or 4, width] float32
    V,
    distance,  # between the rows of z
    width,
    a,
    b,
    BOTH: tl.constexpr,
    LANES: tl.constexpr,
    DEPTH: tl.constexpr,
):
    row = tl.program_id(0)
    first = z + row.to(tl.int64) * distance
    lane = tl.arange(0, DEPTH)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    a2 = a * LOG2E
    b2 = b * LOG2E
    top = tl.full((LANES,), float("-inf"), tl.float32)
    total = tl.zeros((LANES,), tl.float32)
    second = tl.zeros((LANES,), tl.float32)
    whole = V // (LANES * DEPTH) * (LANES * DEPTH)
    for at in range(0, whole, LANES * DEPTH):
        x = tl.load(first + at + lane).to(tl.float32)
        top, total, second = _step(x, top, total, second, a2, b2, BOTH)
    if whole < V:
        x = tl.load(first + whole + lane, mask=whole + lane < V, other=float("-inf")).to(tl.float32)
        top, total, second = _step(x, top, total, second, a2, b2, BOTH)
    best = tl.max(top, 0)
    fade = top - finite_or_zero(best)
    nothing = (best - best) * 0.0  # NaN for a row without finite values
    tl.store(out + row, best * a)
    tl.store(out + width + row, tl.log(tl.sum(total * tl.exp2(fade * a2), 0)) + nothing)
    if BOTH:
        tl.store(out + 2 * width + row, best * b)
        tl.store(out + 3 * width + row, tl.log(tl.sum(second * tl.exp2(fade * b2), 0)) + nothing)


@lru_cache(maxsize=KEPT)
def _launch(
    device: torch.device, dtype: torch.dtype, n: int, vocab: int, distance: int, scales: tuple[float, ...]
) -> Launch:
    a, b = scales[0], scales[-1]
    bound = {"V": vocab, "distance": distance, "width": row_distance(n), "a": a, "b": b, "BOTH": len(scales) > 1}
    return Launch(
        softmax_statistics_kernel, (n, 1, 1), bound | {"LANES": ROW_LANES, "DEPTH": ROW_DEPTH, "num_warps": 8}
    )


def row_distance(n: int) -> int:
    """Between the rows of a result for n rows of logits."""
    return -(-n // ALIGNED) * ALIGNED


def softmax_statistics(z: Tensor, scales: Sequence[float]) -> Iterator[tuple[Tensor, Tensor]]:
    """(top, log_total), [n, 1] float32 each, of each of the positive ``scales`` times z [n, V]."""
    n, vocab = z.shape
    for at in range(0, len(scales), 2):
        some = tuple(scales[at : at + 2])
        out = z.new_empty((2 * len(some), row_distance(n)), dtype=torch.float32)
        if n:
            with on_device(z):
                _launch(z.device, z.dtype, n, vocab, z.stride(0), some).run(z=z, out=out)
        for k in range(len(some)):
            top, log_total = out[2 * k, :n, None], out[2 * k + 1, :n, None]
            yield top, log_total
