"""Elementary functions of float32 values inside a kernel, as precise as the head's dtype requires.

PRECISE, for float32 heads, gives errors of a few units in the last place, also near zeros of the function. Without it
the hardware's approximations are used; their errors are far below the rounding of bfloat16 and float16.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusedhead.kernels.triton_engine.constants import LN2, LOG2E, TWO_LOG2E


@triton.jit
def tanh(x, PRECISE: tl.constexpr):
    """tanh x with an absolute error of 1e-7; with PRECISE a relative error of 3e-7, near zero as well."""
    t = tl.exp2(tl.abs(x) * -TWO_LOG2E)
    y = (1.0 - t) * (1.0 / (1.0 + t))  # the compiler shares this reciprocal with the derivative's
    y = tl.where(x < 0, -y, y)
    if PRECISE:
        s = x * x
        series = 0.021869488536155 + s * -0.008863235529902202
        series = 0.13333333333333333 + s * (-0.05396825396825397 + s * series)
        y = tl.where(tl.abs(x) < 0.3, x * (1.0 + s * (-0.3333333333333333 + s * series)), y)
    return y


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(x * -LOG2E))


@triton.jit
def exp(x, PRECISE: tl.constexpr):
    """e^x. PRECISE carries x log2 e in two floats: rounded to one it costs |x| / 2 units in the result's last place."""
    p = x * LOG2E
    y = tl.exp2(p)
    if PRECISE:
        low = tl.fma(x, 1.4426950216293335, -p)
        low = tl.fma(x, 1.925963033500601e-08, low)
        y = tl.where((y > 0.0) & (y < float("inf")), tl.fma(y, low * LN2, y), y)
    return y


@triton.jit
def _log_ratio(s):
    """ln((1 + s) / (1 - s)) for |s| <= 0.18."""
    t = s * s
    return 2.0 * s * (1.0 + t * (0.3333333333333333 + t * (0.2 + t * (0.14285714285714285 + t * 0.1111111111111111))))


@triton.jit
def log(x, PRECISE: tl.constexpr):
    """ln x; with PRECISE the relative error is small near x = 1, the zero of ln, as well."""
    y = tl.log2(x) * LN2
    if PRECISE:
        y = tl.where(tl.abs(x - 1.0) < 0.3, _log_ratio((x - 1.0) / (x + 1.0)), y)
    return y


@triton.jit
def log1p(x, PRECISE: tl.constexpr):
    """ln(1 + x) with a small relative error, near x = 0 as well."""
    return tl.where(tl.abs(x) < 0.3, _log_ratio(x / (2.0 + x)), log(1.0 + x, PRECISE))


@triton.jit
def expm1(x, PRECISE: tl.constexpr):
    """e^x - 1 with a small relative error, near x = 0 as well."""
    series = 0.008333333333333333 + x * (0.001388888888888889 + x * 0.0001984126984126984)
    series = x * (1.0 + x * (0.5 + x * (0.16666666666666666 + x * (0.041666666666666664 + x * series))))
    return tl.where(tl.abs(x) < 0.35, series, exp(x, PRECISE) - 1.0)


@triton.jit
def sign(x):
    return (x > 0.0).to(tl.float32) - (x < 0.0).to(tl.float32)


@triton.jit
def quotient(a, b, PRECISE: tl.constexpr):
    if PRECISE:
        y = tl.div_rn(a, b)
    else:
        y = a / b
    return y


@triton.jit
def sqrt(x, PRECISE: tl.constexpr):
    if PRECISE:
        y = tl.sqrt_rn(x)
    else:
        y = tl.sqrt(x)
    return y
