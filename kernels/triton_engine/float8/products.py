"""Products of float8 matrices: cuBLAS through torch, with sums that lose nothing on the way.

    out [m, n] = scale · a [m, k] @ b [n, k].T        a, b e4m3, both contiguous along k; k and n multiples of 16

Accumulation is the slow one: the tensor cores' own sums of float8 products keep 14 bits, and over a vocabulary that
costs 5e-2 of dh. ``out`` is bfloat16 or float32. `torch._scaled_mm` is reached here alone; without tensor cores of that
kind, as in the interpreter, the product is that of the same numbers in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor


def float8_product(a: Tensor, b: Tensor, scale: Tensor, out: Tensor) -> None:
    """out <- scale · a @ b.T; ``scale`` [] float32 on the device."""
    if out.device.type == "cuda":
        one = torch.ones_like(scale)
        torch._scaled_mm(a, b.t(), one, scale, out_dtype=out.dtype, use_fast_accum=False, out=out)
    else:
        out.copy_(a.float() @ b.float().t() * scale)
