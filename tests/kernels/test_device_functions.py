"""Elementary functions inside kernels, against float64: near their zeros too where precision is asked for."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is published for Linux only")
if torch.cuda.is_available():
    pytest.skip("kernels are compiled here, not interpreted: benchmarks/gpu_check.py", allow_module_level=True)

import triton
import triton.language as tl

from fusedhead.kernels.triton_engine.device import functions

# numpy speaks up where a GPU stays silent (log2 0, inf - inf)
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")
NEAR_ZERO = torch.cat([s * torch.logspace(-7, -0.5, 60) for s in (-1, 1)])
WIDE = torch.linspace(-20, 20, 128)


@triton.jit
def _apply(x, out, NAME: tl.constexpr, PRECISE: tl.constexpr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    z = tl.load(x + at)
    if NAME == "tanh":
        y = functions.tanh(z, PRECISE)
    elif NAME == "exp":
        y = functions.exp(z, PRECISE)
    elif NAME == "log":
        y = functions.log(z, PRECISE)
    elif NAME == "log1p":
        y = functions.log1p(z, PRECISE)
    elif NAME == "expm1":
        y = functions.expm1(z, PRECISE)
    elif NAME == "sigmoid":
        y = functions.sigmoid(z)
    else:
        y = functions.sign(z)
    tl.store(out + at, y)


def computed(name: str, x: torch.Tensor, precise: bool) -> torch.Tensor:
    padded = torch.nn.functional.pad(x, (0, 128 - len(x)), value=1.0)
    out = torch.empty_like(padded)
    _apply[(1,)](padded, out, name, precise, 128)
    return out[: len(x)]


@pytest.mark.parametrize(
    ("name", "x"),
    [
        ("tanh", NEAR_ZERO),
        ("tanh", WIDE),
        ("exp", WIDE),
        ("log", 1 + NEAR_ZERO),
        ("log", torch.logspace(-20, 20, 120)),
        ("log1p", NEAR_ZERO),
        ("expm1", NEAR_ZERO),
        ("expm1", WIDE),
    ],
)
def test_precise_functions_err_by_a_few_units_in_the_last_place(name: str, x: torch.Tensor) -> None:
    exact = getattr(torch, name)(x.double())
    torch.testing.assert_close(computed(name, x, precise=True).double(), exact, rtol=6e-7, atol=1e-30)


@pytest.mark.parametrize("name", ["tanh", "exp", "sigmoid"])
def test_fast_functions_err_less_than_a_rounding_to_two_bytes(name: str) -> None:
    exact = getattr(torch, name)(WIDE.double())
    torch.testing.assert_close(computed(name, WIDE, precise=False).double(), exact, rtol=1e-5, atol=1e-7)


def test_the_sign_of_a_number() -> None:
    x = torch.tensor([-2.0, -0.0, 0.0, 3.0])
    assert torch.equal(computed("sign", x, precise=False), x.sign())
