"""Float8 products: cuBLAS through torch, with float32 accumulation.

    out[m, n] = scale · Σ_k a[m, k] b[n, k]

in: a [m, k], b [n, k] e4m3, both contiguous along k, k and n multiples of 16; scale [] float32. out: [m, n] bfloat16 or
float32. FLOP 2mnk; bytes: mk + nk read, 2mn or 4mn written. The fast accumulation of the tensor cores is off: it keeps
14 bits, which over a vocabulary would cost dh 5e-2. `torch._scaled_mm` is called only here. On a CPU, for the
interpreter, the same numbers are multiplied in float32.
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
