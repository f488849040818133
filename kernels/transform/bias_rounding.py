"""Bias rounding: ``addmm`` and ``linear`` of a low precision add the bias before they round z + b once.

In a chain this is ``addcol:k round:t`` at the beginning, t being the dtype of the product. Rounding the bare product
first and the sum again would give other logits.
"""

from __future__ import annotations

import torch

from fusedhead.kernels.transform.transform import Step, Transform

TWO_BYTES = (torch.bfloat16, torch.float16)


def rounded_bias(transform: Transform, dtype: torch.dtype) -> int | None:
    """The index of the column vector that is rounded together with a product of ``dtype``; None where there is none.

    After such a product the remaining chain is ``transform.steps[2:]``.
    """
    if dtype not in TWO_BYTES or len(transform.steps) < 2:
        return None
    first, second = transform.steps[:2]
    once = first.op == "addcol" and second == Step("round", str(dtype).removeprefix("torch."))
    return int(first.value) if once else None
