"""Scale rows: the last step of dh in the single pass, one factor a row and a rank-one term.

    out[i, d] = scale[i] product[i, d] + r[i] b[d]

in: product = E w [N, D] float32, or out itself; scale, r [N], b [D] float32. out: [N, D] in the dtype of h, rounded
once. FLOP ND, 3ND with the rank-one term. Bytes: 6ND for h of two bytes.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedhead.kernels.triton_engine.launch.launch import Launch
from fusedhead.kernels.triton_engine.launch.sweep import KEPT


@triton.jit(do_not_specialize=("N", "D"))
def scale_kernel(
    product,  # [N, D] float32: E w
    scale,  # [N] float32
    r,  # [N] float32 when RANK_ONE
    b,  # [D] float32 when RANK_ONE
    out,  # [N, D] dtype of h
    N,
    D,
    RANK_ONE: tl.constexpr,
    INNER: tl.constexpr,
):
    """out = scale ⊙ product + r ⊗ b. One program a row; ``product`` may be ``out`` itself."""
    row = tl.program_id(0)
    s = tl.load(scale + row)
    base = row.to(tl.int64) * D
    for d in range(0, D, INNER):
        inner = d + tl.arange(0, INNER)
        x = tl.load(product + base + inner, mask=inner < D, other=0.0).to(tl.float32) * s
        if RANK_ONE:
            x += tl.load(r + row) * tl.load(b + inner, mask=inner < D, other=0.0)
        tl.store(out + base + inner, x.to(out.dtype.element_ty), mask=inner < D)


@lru_cache(maxsize=KEPT)
def _scale_launch(device: torch.device, dtype: torch.dtype, n: int, hidden: int, rank_one: bool, wide: bool) -> Launch:
    return Launch(scale_kernel, (n, 1, 1), {"N": n, "D": hidden, "RANK_ONE": rank_one, "INNER": 1024})


def scale_rows(product: Tensor, scale: Tensor, out: Tensor, rank_one: tuple[Tensor, Tensor] | None) -> None:
    """out [N, D] <- scale ⊙ product + r ⊗ b, (r, b) = ``rank_one`` if given; product [N, D] float32, or out itself."""
    r, b = rank_one or (None, None)
    n, hidden = out.shape
    wide = product.dtype != out.dtype
    launch = _scale_launch(out.device, out.dtype, n, hidden, rank_one is not None, wide)
    launch.run(product=product, scale=scale, r=r, b=b, out=out)
