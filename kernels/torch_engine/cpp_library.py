"""The C++ kernel of the torch engine, compiled once a machine by Inductor's C++ compiler into Inductor's cache.

It computes windows of float32 heads on x86 CPUs with AVX2 or AVX-512 (`window.cpp`). Where there is no compiler, or it
fails, torch ops compute them.
"""

from __future__ import annotations

import ctypes
import logging
import platform
import threading
from functools import cache
from importlib import resources

import torch

log = logging.getLogger("fusedhead")
LEAST_FLOP = 1 << 31  # of a product: a smaller one, under 10 ms of a core, does not repay the kernel's compilation
LEAST_BITS = 256  # of a vector
MACHINES = ("x86_64", "AMD64")  # architectures on which the kernel was measured
_LOADING = threading.Lock()


def threads_of_kernel(dtype: torch.dtype, device_type: str, flop: int) -> int:
    """The threads with which the kernel computes a head whose product takes ``flop``; 0 where torch ops do.

    The first head that is large enough waits for the compilation.
    """
    if dtype != torch.float32 or device_type != "cpu" or flop < LEAST_FLOP:
        return 0
    return torch.get_num_threads() if library() is not None else 0


def library() -> ctypes.CDLL | None:
    """The compiled kernel, None where it cannot be compiled."""
    with _LOADING:
        return _load()


@cache
def _load() -> ctypes.CDLL | None:
    try:
        if platform.machine() not in MACHINES or vector_bits() < LEAST_BITS:
            return None
        return compiled_library(kernel_source())
    except Exception as error:  # of a compiler, of many kinds
        log.info("heads on this CPU are computed by torch ops: their C++ kernel cannot be compiled (%s)", error)
        return None


def kernel_source() -> str:
    """The kernel's C++: `window.cpp` with the file that it includes in its place, which the compiler's cache reads."""
    folder = resources.files(__package__)
    return (
        folder.joinpath("window.cpp").read_text().replace('#include "tiles.h"', folder.joinpath("tiles.h").read_text())
    )


def vector_bits() -> int:
    """Bits of the vectors that Inductor compiles for, 0 for none."""
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    isa = pick_vec_isa()
    return int(isa.bit_width()) if isa else 0


def compiled_library(source: str) -> ctypes.CDLL:
    """A C++ source as a library, with torch's headers and flags."""
    from torch._inductor.codecache import CppCodeCache

    return CppCodeCache.load(source)
