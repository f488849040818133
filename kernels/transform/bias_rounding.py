"""Where a program adds a head's bias before it rounds: ``addmm`` and ``linear`` of a low precision round z + b once.

In a chain that is ``addcol:k round:t`` at its beginning, t being the dtype of the product. Whoever rounds the bare
product to t first, and the sum again, makes other logits of it.
"""

from __future__ import annotations

import torch

from fusedhead.kernels.transform.transform import Step, Transform

TWO_BYTES = (torch.bfloat16, torch.float16)


def rounded_bias(transform: Transform, dtype: torch.dtype) -> int | None:
    """Which column vector is the bias of a product of ``dtype`` that is rounded with it; None where there is none.

    The chain of what is left to do after such a product is ``transform.steps[2:]``.
    """
    if dtype not in TWO_BYTES or len(transform.steps) < 2:
        return None
    first, second = transform.steps[:2]
    once = first.op == "addcol" and second == Step("round", str(dtype).removeprefix("torch."))
    return int(first.value) if once else None
