"""The GPUs that the Triton engine runs on: Hopper, where it is tested, and others that pass a self-check.

The kernels take products in bfloat16, which NVIDIA's chips have from capability 8.0 on. For every generation since, and
for AMD's gfx942, they compile (benchmarks/results/registers); where no test has run them, each model of GPU is checked
once (`self_check`). A GPU that fails uses the torch engine. This file does not import Triton, which a machine without a
GPU need not have.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from fusedhead.kernels import self_check

LEAST_CAPABILITY = 8
TESTED = (9,)  # major capabilities on which tests/gpu and benchmarks/gpu_check.py run


@lru_cache(maxsize=1)
def triton_serves() -> bool:
    """Whether the engine serves every GPU that torch sees. True where torch sees none."""
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
    """Start the self-checks of this machine's GPUs in the background, so that they run beside the compilation of a
    model.
    """
    for index in range(torch.cuda.device_count()):
        hopper = torch.version.hip is None and torch.cuda.get_device_capability(index)[0] in TESTED
        self_check.start("pairs" if hopper else "triton", torch.device("cuda", index))
