"""Heads with random operands for the scripts that run the CUDA engine by itself, without a compiled graph around it.

`gpu_check` compares their results with float64, `gpu_times` and `gpu_host` time them. This file must not run a kernel.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fusedhead.kernels.contract import Head, Needs, RowGrads
from fusedhead.kernels.transform.transform import parse

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
OPERANDS = Needs(True, True, False, False)


class Case(NamedTuple):
    """One head to check or to time: sizes, dtype and what is special about it."""

    n: int
    d: int
    v: int
    dtype: torch.dtype
    transform: str = ""
    k: int = 1
    transposed: bool = False
    weighted: bool = False
    grads: str = "loss"  # "loss" (one sweep), "stats" (any upstream), "smooth" (one sweep with the sum)
    tokens: int = 0  # rows of a window, 0 for all
    kept: int = 0  # columns whose exponentials are kept, 0 for all

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        extra = " w.T" if self.transposed else ""
        size = f"{self.n}x{self.d}x{self.v} {name}{extra}"
        return f"{size} K={self.k} {self.grads} m={self.tokens} v={self.kept} '{self.transform}'"


SOFTCAP = "mul:0.03333333333333333 tanh mul:30.0"


def make_head(c: Case, device: str, peaked: bool = True) -> Head:
    """Rows with logits of standard deviation 2; most labels are likely, as in a trained model."""
    g = torch.Generator(device).manual_seed(c.n + c.v)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=g, device=device)

    w = normal(c.v, c.d) / c.d**0.5
    y = torch.randint(0, c.v, (c.n, c.k), generator=g, device=device)
    h = 2 * normal(c.n, c.d)
    if peaked and c.k:
        strength = 20 * torch.rand(c.n, 1, generator=g, device=device)
        h += torch.where(torch.arange(c.n, device=device)[:, None] % 10 < 7, strength, 0) * w[y[:, 0]]
    w = w.to(c.dtype)
    if c.transposed:
        w = w.t().contiguous().t()
    cols = normal(2, c.v)
    rows = torch.rand(2, c.n, generator=g, device=device) + 0.5
    u = torch.rand(c.v, generator=g, device=device) if c.weighted else torch.empty(0, device=device)
    return Head(h.to(c.dtype), w, y, cols, rows, u, parse(c.transform))


def make_grads(c: Case, head: Head) -> RowGrads:
    """Cross-entropy's mean over rows of which every 17th is ignored; random ones for "stats"."""
    n, device = c.n, head.h.device
    keep = (torch.arange(n, device=device) % 17 != 3).float()
    lse = keep / keep.sum()
    picked = -lse[:, None].expand(n, c.k).contiguous() / max(c.k, 1) if c.k else None
    if c.grads == "stats":
        total, entropy, variance = (scale * torch.rand_like(lse) / n for scale in (1e-3 / c.v, 1.0, 1.0))
        return RowGrads(lse, picked, total, entropy, variance=variance)
    if c.grads == "smooth":
        return RowGrads(lse, None if picked is None else 0.9 * picked, -0.1 * lse / c.v)
    return RowGrads(lse, picked, square=1e-4 * lse)
