"""Heads to test with: operands of many shapes and kinds, the truth in float64, and eager code in the same dtype."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fusedhead.lowering.ops  # noqa: F401  registers torch.ops.fusedhead
from benchmarks.measure import cpu_allocations, peak_of
from fusedhead.kernels.contract import Head, RowStats
from fusedhead.kernels.reference import row_stats
from fusedhead.kernels.torch_engine import product_dtypes
from fusedhead.kernels.torch_engine.product_dtypes import product_dtype
from fusedhead.kernels.transform.transform import parse

OPS = torch.ops.fusedhead
ALL = "lse,picked,sum,entropy,max,argmax"
RAGGED = ((0, 507, 123), (1, 507, 123), (7, 50257, 6), (252, 507, 123))  # N, V, D


# (dtype of a head, dtype of its products): both answers of a CPU that is asked whether it multiplies bfloat16
MULTIPLIED = (
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
)


def multiplies(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, products: torch.dtype) -> None:
    """Have the torch engine multiply heads of ``dtype`` in ``products``, whatever this machine's CPU prefers."""
    monkeypatch.setattr(product_dtypes, "cpu_multiplies_bfloat16", lambda: products == torch.bfloat16)
    assert product_dtype(dtype, "cpu") == products


class Operands(NamedTuple):
    """The tensor arguments of an op, in order."""

    h: Tensor
    w: Tensor
    y: Tensor
    cols: Tensor
    rows: Tensor
    u: Tensor


def operands(
    n: int, v: int, d: int, k: int = 1, dtype: torch.dtype = torch.float64, spread: float = 1.0, u: bool = True
) -> Operands:
    """Random operands whose logits have about the standard deviation ``spread``; two column vectors, one row vector."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return Operands(
        torch.randn(n, d, dtype=torch.float64).to(dtype),
        (torch.randn(v, d, dtype=torch.float64) * spread / d**0.5).to(dtype),
        torch.randint(0, v, (n, k)),
        torch.randn(2, v, dtype=wide),
        torch.randn(1, n, dtype=wide),
        torch.randn(v, dtype=wide) if u else torch.empty(0, dtype=wide),
    )


def leaves(o: Operands, wanted: str = "h w cols rows") -> Operands:
    """Copies of the operands, of which the wanted ones want gradients."""
    names = wanted.split()
    return Operands(*(x.detach().clone().requires_grad_(name in names) for name, x in zip(Operands._fields, o)))


def truth(o: Operands, transform: str = "") -> RowStats:
    """The definition, in the dtype of the operands."""
    return row_stats(Head(*o, parse(transform)))


def none(like: Tensor) -> Tensor:
    """An absent operand."""
    return like.new_empty(0, dtype=torch.float64 if like.dtype == torch.float64 else torch.float32)


def cross_entropy(o: Operands, c: Tensor, transform: str = "", memory: int = 0) -> tuple[Tensor, ...]:
    """lse, picked, sum, dh, dw, dcols, drows of Σ c_i nll_i."""
    e = none(o.h)
    return OPS.head_loss(*o, c, -c[:, None], e, e, transform, "lse,picked", memory, True, True, False, False)


def eager_losses(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    """The per-token losses a user would write: logits in the operands' dtype, the softmax in float32."""
    z = h @ w.T
    return F.cross_entropy(z if z.dtype == torch.float64 else z.float(), y[:, 0], reduction="none")


def distance(got: Tensor, true: Tensor) -> float:
    """|got - true| over |true|, Frobenius."""
    return float((got.double() - true).norm() / true.norm().clamp_min(1e-300))


def opcheck(op: Any, arguments: tuple[Any, ...]) -> None:
    """torch's own check of an op, which from torch 2.15 on reads ``.grad`` of the copies it makes of leaves."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"The \.grad attribute of a Tensor that is not a leaf", UserWarning)
        torch.library.opcheck(op, arguments)


FIXED = 64 << 10  # bytes of row vectors [N]: results and coefficients


def watch(call):
    """(result, bytes live at the peak, bytes of the largest allocation) of a call, what it returns included."""
    result, allocated = cpu_allocations(call)
    return result, peak_of(allocated), max(allocated, default=0)


def size(tensors) -> int:
    return sum(x.numel() * x.element_size() for x in tensors if x is not None)
