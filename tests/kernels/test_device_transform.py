"""A transform inside kernels: its values, and its derivative as one chain and as row factor times column factor."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is published for Linux only")
if torch.cuda.is_available():
    pytest.skip("kernels are compiled here, not interpreted: benchmarks/gpu_check.py", allow_module_level=True)

import triton
import triton.language as tl

from fusedhead.kernels.transform.transform import apply, parse
from fusedhead.kernels.triton_engine.device.transform import (
    column_slope,
    decided,
    pulled_back,
    row_slope,
    steps_of,
    transform,
)
from fusedhead.kernels.triton_engine.device.vectors import Vectors
from tests.kernels.interpreted import EACH_STEP, FUNCTIONS

N, V = 16, 32
CHAINS = (
    "",
    "mul:0.5",
    "addcol:0 mul:0.2 tanh mul:5.0",
    "setcol:1",
    "dropcol:0 mulrow:0",
    EACH_STEP,
    FUNCTIONS["gelu"],
)


@triton.jit
def _transformed(
    z, g, cols, stride_cols, rows, stride_rows, out, rounded, pulled, factors,
    STEPS: tl.constexpr, N: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    row, col = tl.arange(0, N), tl.arange(0, V)
    at = row[:, None] * V + col[None, :]
    vectors = Vectors(cols, stride_cols, V, rows, stride_rows, N)
    x = tl.load(z + at)
    tl.store(out + at, transform(x, vectors, col, row, STEPS, len(STEPS) // 2, True))
    tl.store(rounded + at, decided(x, vectors, col, row, STEPS, True))
    tl.store(pulled + at, pulled_back(tl.load(g + at), x, vectors, col, row, STEPS, 0, True))
    slope = column_slope(x, vectors, col, row, STEPS, True) * row_slope(vectors, row, STEPS)[:, None]
    tl.store(factors + at, tl.load(g + at) * slope)


def computed(chain: str, z: torch.Tensor, g: torch.Tensor, cols: torch.Tensor, rows: torch.Tensor):
    results = [torch.empty_like(z) for _ in range(4)]
    _transformed[(1,)](z, g, cols, cols.stride(0), rows, rows.stride(0), *results, steps_of(parse(chain)), N, V)
    return results


@pytest.mark.parametrize("chain", CHAINS)
def test_values_and_derivatives_are_those_of_the_table(chain: str) -> None:
    torch.manual_seed(0)
    z, g = torch.randn(N, V), torch.randn(N, V)
    cols, rows = torch.randn(2, V), torch.rand(2, N) + 0.5
    cols[0, ::3], cols[1, ::2] = 0, torch.nan if "setcol" in chain else 1.5
    value, _, pulled, factors = computed(chain, z, g, cols, rows)
    wide = z.double().requires_grad_()
    exact = apply(parse(chain), wide, cols.double(), rows.double())
    (slope,) = torch.autograd.grad(exact, wide, g.double())
    torch.testing.assert_close(value.double(), exact.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(pulled.double(), slope, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(factors.double(), slope, rtol=1e-5, atol=1e-6)


def test_rounding_steps_bind_decisions_alone() -> None:
    z = torch.randn(N, V)
    value, rounded, *_ = computed("mul:1.5 round:float16", z, z, torch.zeros(1, V), torch.zeros(1, N))
    assert torch.equal(value, z * 1.5)
    assert torch.equal(rounded, (z * 1.5).half().float())
