"""The second and third GEMM of a head: cuBLAS through torch, written directly to the result.

    gemm(a, b, out)                   out = a @ b
    gemm(a, b, out, add=True)         out += a @ b

in: a [m, k], b [k, n] of one dtype, out [m, n] of that dtype or float32 (then rounded nowhere). No temporaries on CUDA.
FLOP 2mnk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusedhead.kernels.chips import triton_serves


def gemm(a: Tensor, b: Tensor, out: Tensor, add: bool = False, alpha: float = 1.0) -> None:
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, beta=float(add), alpha=alpha, out=out)
    elif out.device.type == "cuda" and triton_serves():
        torch.addmm(out, a, b, out_dtype=out.dtype, beta=float(add), alpha=alpha, out=out)
    else:  # a device without mixed products, such as the interpreter's
        torch.addmm(out, a.to(out.dtype), b.to(out.dtype), beta=float(add), alpha=alpha, out=out)


def weighted_rows(weights: Tensor, x: Tensor) -> Tensor:
    """Σ_i weights[i] x[i]: weights [n] float32, x [n, d] -> [d] float32.

    The weights are split into two terms of x's dtype, so that they are not rounded. x is read once.
    """
    out = x.new_empty((2, x.shape[1]), dtype=torch.float32)
    high = weights.to(x.dtype)
    low = (weights - high.float()).to(x.dtype)
    gemm(torch.stack((high, low)), x, out)
    return out.sum(0)
