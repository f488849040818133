"""Scale in place: x ← g x and y ← g y, without moving a byte if g is 1.

in and out: x [M], y [M'] of one floating dtype, contiguous; g [] on the same device. FLOP M + M'. Bytes: each element
of x and y read and written once, or none. A loss gives the gradients of h and w up to the gradient of the loss itself.
That is 1 in most programs, but only the device knows. Every program of the grid reads g first and returns at once if |g
- 1| is too small to change a rounded product.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedhead.kernels.triton_engine.launch.launch import Launch, on_device
from fusedhead.kernels.triton_engine.launch.tiles import device_of

BLOCK = 4096
PROGRAMS_PER_MULTIPROCESSOR = 8


@triton.jit
def _scale(x_ptr, g, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK
    step = tl.num_programs(0).to(tl.int64) * BLOCK
    while at < size:
        i = at + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + i, mask=i < size)
        tl.store(x_ptr + i, (x.to(tl.float32) * g).to(x_ptr.dtype.element_ty), mask=i < size)
        at += step


@triton.jit
def scale_in_place_kernel(x_ptr, y_ptr, g_ptr, x_size, y_size, unmoved, BLOCK: tl.constexpr):
    g = tl.load(g_ptr).to(tl.float32)
    if not (tl.abs(g - 1.0) <= unmoved):  # true for NaN as well, which must reach x and y
        _scale(x_ptr, g, x_size, BLOCK)
        _scale(y_ptr, g, y_size, BLOCK)


@lru_cache(maxsize=256)
def _launch(device: torch.device, dtypes: tuple[torch.dtype, ...], sizes: tuple[int, int], unmoved: float) -> Launch:
    _, multiprocessors = device_of(device)
    programs = min(triton.cdiv(max(sizes), BLOCK), multiprocessors * PROGRAMS_PER_MULTIPROCESSOR)
    bound = {"x_size": sizes[0], "y_size": sizes[1], "unmoved": unmoved, "BLOCK": BLOCK, "num_warps": 8}
    return Launch(scale_in_place_kernel, (programs, 1, 1), bound)


def scale_pair_in_place(x: Tensor, y: Tensor | None, g: Tensor, unmoved: float) -> None:
    """``x *= g; y *= g`` in float32, rounded once; g is 0-d. Nothing if |g - 1| <= unmoved. No host sync."""
    sizes = x.numel(), 0 if y is None else y.numel()
    if any(sizes):
        with on_device(x):
            _launch(x.device, (x.dtype, g.dtype), sizes, unmoved).run(x_ptr=x, y_ptr=x if y is None else y, g_ptr=g)
