"""On which GPUs the Triton engine runs: NVIDIA's from capability 8.0 on. Others take the torch engine.

The kernels have PTX in them and products in bfloat16, which older chips lack; AMD's count their capabilities
differently. This file must not import Triton, which need not be there on a machine without a GPU.
"""

from __future__ import annotations

from functools import lru_cache

import torch

LEAST_CAPABILITY = 8


@lru_cache(maxsize=1)
def triton_serves() -> bool:
    """Whether every GPU that torch sees is such a chip; so it is where it sees none."""
    if torch.version.hip is not None:
        return False
    majors = (torch.cuda.get_device_capability(at)[0] for at in range(torch.cuda.device_count()))
    return all(major >= LEAST_CAPABILITY for major in majors)
