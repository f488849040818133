"""The interpreter rounds a fused multiply-add once, under every version of Triton."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="Triton is published for Linux only")

import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from tests.kernels.fused_multiply_add import round_once, rounds_once

if torch.cuda.is_available():
    pytest.skip("kernels are compiled here, not interpreted", allow_module_level=True)


@triton.jit
def _fma(x, y, z, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out + at, tl.fma(tl.load(x + at), tl.load(y + at), tl.load(z + at)))


def test_a_fused_multiply_add_rounds_once() -> None:
    assert rounds_once()
    draw = torch.Generator().manual_seed(0)
    x, y = (torch.randn(64, generator=draw) for _ in range(2))
    z, out = -(x * y), torch.empty(64)  # what is left is the rounding of the product
    _fma[(1,)](x, y, z, out, 64)
    assert (out != 0).any()
    assert torch.equal(out, (x.double() * y.double() + z.double()).float())


def test_an_interpreter_that_rounds_twice_is_repaired(monkeypatch: pytest.MonkeyPatch) -> None:
    twice = lambda self, x, y, z: TensorHandle(x.data * y.data + z.data, z.dtype.scalar)  # noqa: E731
    monkeypatch.setattr(InterpreterBuilder, "create_fma", twice)
    assert not rounds_once()
    round_once()
    assert rounds_once()
