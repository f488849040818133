"""On which GPUs the Triton engine runs: Hopper, where it is tested, and others where a self-check says so.

The kernels take products in bfloat16, which NVIDIA's chips have from capability 8.0 on. For every generation since,
and for AMD's gfx942, they compile (benchmarks/results/registers); where no test has run them, each model of GPU is
asked once (`self_check`). What does not serve takes the torch engine. This file must not import Triton, which need not
be there on a machine without a GPU.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from fusedhead.kernels import self_check

LEAST_CAPABILITY = 8
TESTED = (9,)  # major capabilities on which tests/gpu and benchmarks/gpu_check.py run


@lru_cache(maxsize=1)
def triton_serves() -> bool:
    """Whether every GPU that torch sees is such a chip; so it is where it sees none."""
    return all(_serves(at) for at in range(torch.cuda.device_count()))


def _serves(index: int) -> bool:
    major = torch.cuda.get_device_capability(index)[0]
    if torch.version.hip is None and (major < LEAST_CAPABILITY or major in TESTED):
        return major in TESTED
    return self_check.serves("triton", torch.device("cuda", index))


def float8_serves(device: torch.device | None) -> bool:
    """Whether float8 products and the sweep that stores their operands run on this GPU, the current one where None."""
    if not torch.cuda.is_available() or torch.version.hip is not None or not hasattr(torch, "_scaled_mm"):
        return False
    at = torch.device("cuda", torch.cuda.current_device()) if device is None or device.index is None else device
    return torch.cuda.get_device_capability(at)[0] in TESTED and all(
        self_check.serves(name, at) for name in ("pairs", "float8")
    )


def start_checks() -> None:
    """Begin the self-checks that a head's first run on this machine's GPUs would wait for, beside its compilation."""
    for index in range(torch.cuda.device_count()):
        hopper = torch.version.hip is None and torch.cuda.get_device_capability(index)[0] in TESTED
        self_check.start("pairs" if hopper else "triton", torch.device("cuda", index))
