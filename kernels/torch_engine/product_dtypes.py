"""The dtypes in which the torch engine multiplies and keeps a window of exponentials for a later product.

| head     | device multiplies it     | products | kept                                                          |
|----------|--------------------------|----------|---------------------------------------------------------------|
| float32  |                          | float32  | float32                                                       |
| bfloat16 | yes                      | bfloat16 | bfloat16                                                      |
| bfloat16 | no: a CPU without AVX-512| float32  | bfloat16                                                      |
| float16  | never: exp z leaves it   | float32  | float16 where a bound of the slope tells how to fit it in     |

A kept window as wide as widened products would take twice the bytes, so that half as many tokens fit and twice as many
windows are needed.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch

from fusedhead.kernels.contract import stat_dtype
from fusedhead.kernels.transform.transform import Transform


@cache
def cpu_multiplies_bfloat16() -> bool:
    """Whether oneDNN has matrix products of bfloat16 for this CPU. No, where torch is built without it."""
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return supported is not None and bool(supported())


def product_dtype(dtype: torch.dtype, device_type: str) -> torch.dtype:
    """The dtype of a head's matrix products: its own where the hardware multiplies it fast, else float32.

    float16 is always widened, because exp z would leave its range.
    """
    if dtype == torch.bfloat16:
        native = device_type == "cuda" or (device_type == "cpu" and cpu_multiplies_bfloat16())
        return dtype if native else torch.float32
    return stat_dtype(dtype)


def _steepest(transform: Transform) -> float | None:
    """An upper bound of E' / E, the slope of the transform; None where the transform's text gives none.

    Where z is h wᵀ times a constant, the row scales take the constant, so the bound leaves it out.
    """
    return 1.0 if transform.plain_scale is not None else transform.steepest


def kept_dtype(dtype: torch.dtype, products: torch.dtype, transform: Transform) -> torch.dtype:
    """The dtype in which a window of E' = exp(z - level) ∂z/∂(h wᵀ) is kept, for a head of ``dtype``."""
    if dtype == torch.float16:
        return dtype if _steepest(transform) else products
    return dtype


class Range(NamedTuple):
    """The range of a row's sum of E in which the window is kept without loss, and the best place in it."""

    least: float
    aim: float | None  # None: anywhere
    most: float


def kept_range(kept: torch.dtype, transform: Transform) -> Range:
    """The range for a window kept in ``kept``.

    float16 holds numbers up to 65504, and those from 2^-14 on with all of its 11 bits: where the sum is 2^13, every
    probability from 2^-27 on.
    """
    if kept != torch.float16:
        return Range(1e-20, None, 1e20)
    slope = _steepest(transform) or 1.0
    return Range(2.0**5 / slope, 2.0**13 / slope, 6e4 / slope)
