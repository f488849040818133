"""Numbers that several kernels share, as compile-time constants.

Exponentials are taken in base 2: exp x = 2^(x L) with L the float32 nearest to log2 e.
"""

from __future__ import annotations

import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)  # L once it is rounded to float32
LN2 = tl.constexpr(0.6931471805599453)
INVERSE_L = tl.constexpr(0.6931471824645996)  # 1 / L (not ln 2: L is rounded), as the sum of two float32 numbers
INVERSE_L_LOW = tl.constexpr(7.348693209507928e-09)
LEAST_KEY = tl.constexpr(-2147483648)  # below the order key of every float32
NAN_KEY = tl.constexpr(0x7FFFFFFF)  # of NaN: above every other
NO_COLUMN = tl.constexpr(2147483647)  # past every column of a vocabulary
SIGN_BIT = tl.constexpr(-2147483648)  # the bits of -0.0
SAFE_TOTAL = tl.constexpr(1e18)  # a row's sum of exponentials between this and its inverse has lost nothing
TWO_LOG2E = tl.constexpr(2.8853900817779268)  # exp 2x = 2^(x · this)
LARGEST_FLOAT8 = tl.constexpr(448.0)  # of e4m3
MARKED_TAIL = tl.constexpr(-1e-30)  # -0 once it is rounded to e4m3
