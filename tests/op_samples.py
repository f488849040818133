"""The first samples of an operator in torch's database, with its generator closed.

One left suspended is closed whenever it is collected: it then switches the grad mode inside whatever trace runs. That
is long after its last use: torch's iterator looks at the stack of its maker, whose frame then keeps what it holds.
"""

from __future__ import annotations

import gc
from itertools import islice
from types import GeneratorType
from typing import Any

import torch


def first_samples(op: Any, dtype: torch.dtype, count: int, **more: Any) -> list[Any]:
    """At most ``count`` samples of an OpInfo on the CPU."""
    samples = iter(op.sample_inputs("cpu", dtype, **more))
    result = list(islice(samples, count))
    # an `enumerate` of the generator, which has no `close` itself
    for each in (samples, *gc.get_referents(getattr(samples, "child_iter", None))):
        if isinstance(each, GeneratorType):
            each.close()
    return result
