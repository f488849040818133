"""Launches a kernel again without asking Triton again what cannot have changed.

Triton looks at every argument of every launch to find the compiled kernel. What a kernel is compiled for is the
values bound in `Launch`, the dtypes of the pointers, which its owner keeps the same, and whether pointers are aligned
to 16 bytes, which is looked at here. The first launch, and every launch with a pointer that is not aligned, goes
through Triton; so does everything in Triton's interpreter. This file must not know what any kernel computes.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from triton.runtime import driver

ALIGNED = 16  # bytes: what Triton specialises a pointer on


def on_device(x: Tensor) -> AbstractContextManager[object]:
    """Kernels launch on the current device: make it that of x."""
    if x.device.type != "cuda" or x.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(x.device)


class Launch:
    """One kernel on one grid of one device, with all arguments bound but the leading ones.

    ``bound`` holds the values of the remaining parameters by name, and options (num_warps, ...). Numbers among the
    leading arguments must not be specialised by the kernel.
    """

    __slots__ = ("bound", "grid", "kernel", "options", "pointers", "run")

    def __init__(self, kernel: Any, grid: tuple[int, int, int], bound: dict[str, Any]) -> None:
        names = kernel.arg_names
        leading = next((at for at, name in enumerate(names) if name in bound), len(names))
        self.kernel, self.grid = kernel, grid
        self.bound = tuple(bound[name] for name in names[leading:])
        self.options = {name: value for name, value in bound.items() if name.startswith("num_")}
        self.pointers: tuple[int, ...] = ()  # which of the leading arguments are tensors
        self.run: Callable[..., None] | None = None  # what Triton compiled, for aligned pointers

    def __call__(self, *leading: Any) -> None:
        if self.run is not None:
            given, addresses = list(leading), 0
            for at in self.pointers:
                given[at] = address = leading[at].data_ptr()
                addresses |= address
            if addresses % ALIGNED == 0:
                # an address is passed on as it is; of a tensor the driver would be asked whether it is one of its own
                active = driver.active
                self.run(*given, *self.bound, stream=active.get_current_stream(active.get_current_device()))
                return
        compiled = self.kernel[self.grid](*leading, *self.bound, **self.options)
        pointers = tuple(at for at, x in enumerate(leading) if isinstance(x, Tensor))
        if compiled is not None and all(leading[at].data_ptr() % ALIGNED == 0 for at in pointers):
            self.pointers, self.run = pointers, compiled[self.grid]  # None in the interpreter
