"""Bias rounding: in bfloat16 and float16, ``addmm`` and ``linear`` add the bias in float32 and round z + b once.

A transform writes this as its first two steps ``addcol:k round:t``, where t is the dtype of the product. Rounding h wᵀ
first and the sum again would give other logits.
"""

from __future__ import annotations

import torch

from fusedhead.kernels.transform.transform import Step, Transform

TWO_BYTES = (torch.bfloat16, torch.float16)


def rounded_bias(transform: Transform, dtype: torch.dtype) -> int | None:
    """The index of the column vector that is added before a product of ``dtype`` is rounded, or None.

    Where it is not None, the steps after the product are ``transform.steps[2:]``.
    """
    if dtype not in TWO_BYTES or len(transform.steps) < 2:
        return None
    first, second = transform.steps[:2]
    once = first.op == "addcol" and second == Step("round", str(dtype).removeprefix("torch."))
    return int(first.value) if once else None
