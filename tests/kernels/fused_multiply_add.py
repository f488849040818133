"""``tl.fma`` of Triton's interpreter, rounded once as a GPU rounds it.

The interpreter rounds a product before the sum until Triton 3.9. Code whose digits need one rounding (`device/rows`,
`device/functions`) then errs more than on any GPU.
"""

from __future__ import annotations

import numpy as np
from triton.runtime import interpreter


def rounds_once() -> bool:
    """Whether (1 + 2⁻¹²)² - 1 - 2⁻¹¹ is 2⁻²⁴: the last digit of a product that does not fit float32."""
    one, rest = (np.array([v], np.float32) for v in (1 + 2.0**-12, -1 - 2.0**-11))
    handle = interpreter.TensorHandle
    x, z = handle(one, interpreter.tl.float32), handle(rest, interpreter.tl.float32)
    return bool(interpreter.InterpreterBuilder().create_fma(x, x, z).data[0] == 2.0**-24)


def round_once() -> None:
    """Give the interpreter such an ``fma`` for float32 if it has none: in float64 the product is exact."""
    plain = interpreter.InterpreterBuilder.create_fma

    def create_fma(self, x, y, z):
        if z.data.dtype != np.float32:
            return plain(self, x, y, z)
        with np.errstate(all="ignore"):
            wide = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data.astype(np.float64)
            return interpreter.TensorHandle(wide.astype(np.float32), z.dtype.scalar)

    if not rounds_once():
        interpreter.InterpreterBuilder.create_fma = create_fma
