"""The interpreter rounds a fused multiply-add once, under every version of Triton."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is published for Linux only")

import numpy as np
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from tests.kernels.fused_multiply_add import fused, round_once, rounds_once

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


def rounds_the_product(self, x, y, z):
    return TensorHandle(x.data * y.data + z.data, z.dtype.scalar)


def rounds_the_sum(self, x, y, z):
    total = x.data.astype(np.float64) * y.data + z.data
    return TensorHandle(total.astype(np.float32), z.dtype.scalar)


@pytest.mark.parametrize("twice", [rounds_the_product, rounds_the_sum])
def test_an_interpreter_that_rounds_twice_is_repaired(twice: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(InterpreterBuilder, "create_fma", twice)
    assert not rounds_once()
    round_once()
    assert InterpreterBuilder.create_fma is not twice
    assert rounds_once()


def test_an_interpreter_that_rounds_once_is_left_as_it_is() -> None:
    before = InterpreterBuilder.create_fma
    round_once()
    assert InterpreterBuilder.create_fma is before


def nearest(exact: Fraction) -> np.float32:
    """The float32 next to ``exact``, the even one of two."""
    about = np.float32(float(exact))
    around = (about, *(np.nextafter(about, np.float32(to)) for to in (-np.inf, np.inf)))
    return min(around, key=lambda v: (abs(Fraction(float(v)) - exact), int(v.view(np.int32)) & 1))


NEAR_ONE = st.builds(lambda few, bits: few * 2.0**-bits, st.integers(-8, 8), st.integers(14, 23))


@settings(max_examples=600)
@given(
    NEAR_ONE, st.none() | NEAR_ONE, st.integers(0, 2**23 - 1), st.sampled_from([24, 25]), st.sampled_from([1.0, -1.0])
)
def test_the_repair_rounds_as_fractions_do(a: float, b: float | None, digits: int, apart: int, sign: float) -> None:
    """(1 + a)(1 - a) = 1 - a², 24 powers of two below the addend, is next to the middle of two float32."""
    y = 1 - a if b is None else 1 + b
    values = np.array([1 + a, sign * y * 2.0**-apart, 1 + digits * 2.0**-23], np.float32)
    exact = Fraction(float(values[0])) * Fraction(float(values[1])) + Fraction(float(values[2]))
    assert fused(*values) == nearest(exact)


@pytest.mark.parametrize(
    ("x", "y", "z", "once"),
    [
        (np.inf, 1.0, 1.0, np.inf),
        (np.inf, 0.0, 1.0, np.nan),
        (1.0, np.inf, -np.inf, np.nan),
        (3e38, 2.0, -3e38, np.float32(3e38)),  # the product alone would be infinite
        (3e38, 2.0, 0.0, np.inf),
        (2.0**-100, 2.0**-49, 0.0, 2.0**-149),
        (0.0, -1.0, 0.0, 0.0),
    ],
)
def test_the_repair_keeps_infinities_and_subnormal_numbers(x: float, y: float, z: float, once: float) -> None:
    np.testing.assert_array_equal(fused(*np.array([x, y, z], np.float32)), np.float32(once))
