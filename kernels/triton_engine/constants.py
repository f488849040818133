"""Constants that several kernels share, known at compile time.

Exponentials are taken in base 2, the base of the hardware's instruction: exp x = 2^(x·L), L the float32 nearest to log2
e.
"""

from __future__ import annotations

import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)  # becomes L when a kernel rounds it to float32
LN2 = tl.constexpr(0.6931471805599453)
INVERSE_L = tl.constexpr(0.6931471824645996)  # 1 / L as the sum of two float32 numbers; not ln 2, since L is rounded
INVERSE_L_LOW = tl.constexpr(7.348693209507928e-09)
LEAST_KEY = tl.constexpr(-2147483648)  # smaller than the order key (`device.rows.order_key`) of every float32
NAN_KEY = tl.constexpr(0x7FFFFFFF)  # the order key of NaN, larger than every other
NO_COLUMN = tl.constexpr(2147483647)  # larger than every column of a vocabulary
SIGN_BIT = tl.constexpr(-2147483648)  # the bits of -0.0
SAFE_TOTAL = tl.constexpr(1e18)  # a row's total in (1 / SAFE_TOTAL, SAFE_TOTAL) neither overflowed nor underflowed
TWO_LOG2E = tl.constexpr(2.8853900817779268)  # exp 2x = 2^(x · TWO_LOG2E)
LARGEST_FLOAT8 = tl.constexpr(448.0)  # the largest finite number of e4m3
SATURATES_FLOAT8 = tl.constexpr(432.0)  # the least number that rounds to it: halfway from 416, ties to even
