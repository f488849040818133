"""``tl.fma`` of Triton's interpreter, rounded once as a GPU rounds it.

The interpreter rounds a product before the sum until Triton 3.9. Code whose digits need one rounding (`device/rows`,
`device/functions`) then errs more than on any GPU.
"""

from __future__ import annotations

import numpy as np
from triton.runtime import interpreter

# x, y, z and x·y + z rounded once. The product of the first does not fit float32: rounded alone, it leaves 0. The sum
# of the second does not fit float64: it is 2⁻⁵⁶ below the middle of two float32, and rounded to it goes to the upper.
PROBE = (
    (1 + 2.0**-12, 1 + 2.0**-12, -1 - 2.0**-11, 2.0**-24),
    (2.0**-12 * (1 + 2.0**-16), 2.0**-12 * (1 - 2.0**-16), 1 + 2.0**-23, 1 + 2.0**-23),
)


def rounds_once() -> bool:
    """Whether the interpreter's ``fma`` of float32 rounds neither the product nor the sum before its result."""
    x, y, z, once = np.array(PROBE, np.float32).T
    handles = (interpreter.TensorHandle(v, interpreter.tl.float32) for v in (x, y, z))
    return np.array_equal(interpreter.InterpreterBuilder().create_fma(*handles).data, once)


def fused(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """x·y + z of float32 arrays that broadcast, rounded once to float32.

    The product is exact in float64. The sum is rounded to odd there: of the two float64 around it, the one whose last
    bit is set. That is never the middle of two float32, so the second rounding is the only one (Boldo and Melquiond,
    "Emulation of FMA and correctly rounded sums", 2008).
    """
    with np.errstate(all="ignore"):
        product, addend = x.astype(np.float64) * y.astype(np.float64), z.astype(np.float64)
        total = np.asarray(product + addend)
        rest = total - product
        error = (product - (total - rest)) + (addend - rest)  # exact (Knuth's two-sum); NaN where total is not finite
        even = (total.view(np.int64) & 1) == 0
        inexact = np.isfinite(error) & (error != 0)
        odd = np.where(even & inexact, np.nextafter(total, np.copysign(np.inf, error)), total)
        return odd.astype(np.float32)


def round_once() -> None:
    """Give the interpreter such an ``fma`` for float32 if it has none."""
    plain = interpreter.InterpreterBuilder.create_fma

    def create_fma(self, x, y, z):
        if z.data.dtype != np.float32:
            return plain(self, x, y, z)
        return interpreter.TensorHandle(fused(x.data, y.data, z.data), z.dtype.scalar)

    if not rounds_once():
        interpreter.InterpreterBuilder.create_fma = create_fma
