"""What a result has to say about where it comes from: versions, device, date and command."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import sys

import torch

PACKAGES = ("fusedhead", "torch", "triton", "liger-kernel", "cut-cross-entropy", "quack-kernels",
            "nvidia-cutlass-dsl", "transformers", "accelerate")  # fmt: skip


def versions() -> dict[str, str]:
    """Version of Python, of CUDA and of each package that takes part; "-" where it is missing."""
    by_package = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            by_package[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            by_package[name] = "-"
    by_package["torch"] = torch.__version__
    by_package["cuda"] = torch.version.cuda or "-"
    return by_package


def device_name(device: torch.device) -> str:
    """The GPU's name and memory, or the processor's model and the threads torch uses."""
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        return f"{about.name}, {about.total_memory / 2**30:.0f} GiB"
    model = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as lines:
            model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    return f"{model}, {torch.get_num_threads()} threads"


def origin(device: torch.device, module: str, arguments: list[str] | None = None) -> dict[str, object]:
    """The header of a result file."""
    words = sys.argv[1:] if arguments is None else arguments
    return {
        "command": " ".join(["python", "-m", module, *words]),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "device": device_name(device),
        "versions": versions(),
        "load": f"{os.getloadavg()[0]:.0f}",  # runnable threads of the machine, this program's not yet among them
    }
