"""The first samples of an operator in torch's database, with its generator closed.

One left suspended is closed whenever it is collected: it then switches the grad mode inside whatever trace runs.
"""

from __future__ import annotations

from itertools import islice
from typing import Any

import torch


def first_samples(op: Any, dtype: torch.dtype, count: int, **more: Any) -> list[Any]:
    """At most ``count`` samples of an OpInfo on the CPU."""
    samples = iter(op.sample_inputs("cpu", dtype, **more))
    found = list(islice(samples, count))
    for each in (samples, getattr(samples, "child_iter", None)):
        if hasattr(each, "close"):
            each.close()
    return found
