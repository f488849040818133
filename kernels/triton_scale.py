"""x ← g x in place, for free where g is 1.

    x [M] any floating dtype, contiguous · g [] float32 on the same device · 2 bytes moved per byte of x, or none

The gradients of a loss with respect to h and W are known up to the gradient of the loss itself, which is 1 in most
programs and is known on the device only. Every program of the grid reads g and leaves at once where the rounded
product would be x again. It must not know whose gradient x is.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedhead.kernels.triton_launch import Launch, on_device
from fusedhead.kernels.triton_tiles import device_of

BLOCK = 4096
PROGRAMS_PER_MULTIPROCESSOR = 8


@triton.jit
def scale_in_place_kernel(x_ptr, g_ptr, size, unmoved, BLOCK: tl.constexpr):
    g = tl.load(g_ptr).to(tl.float32)
    if not (tl.abs(g - 1.0) <= unmoved):  # so that a NaN moves on
        at = tl.program_id(0).to(tl.int64) * BLOCK
        step = tl.num_programs(0).to(tl.int64) * BLOCK
        while at < size:
            i = at + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + i, mask=i < size)
            tl.store(x_ptr + i, (x.to(tl.float32) * g).to(x_ptr.dtype.element_ty), mask=i < size)
            at += step


@lru_cache(maxsize=256)
def _launch(device: torch.device, dtypes: tuple[torch.dtype, torch.dtype], size: int, unmoved: float) -> Launch:
    _, multiprocessors = device_of(device)
    programs = min(triton.cdiv(size, BLOCK), multiprocessors * PROGRAMS_PER_MULTIPROCESSOR)
    bound = {"size": size, "unmoved": unmoved, "BLOCK": BLOCK, "num_warps": 8}
    return Launch(scale_in_place_kernel, (programs, 1, 1), bound)


def scale_in_place(x: Tensor, g: Tensor, unmoved: float) -> None:
    """``x *= g`` rounded once from float32, x contiguous and g 0-d; nothing where |g - 1| <= unmoved. No host sync."""
    if x.numel():
        with on_device(x):
            _launch(x.device, (x.dtype, g.dtype), x.numel(), unmoved)(x, g)
