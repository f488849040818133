"""Launches a kernel again without asking Triton again what cannot have changed.

Triton looks at every argument of every launch to find the compiled kernel. What a kernel is compiled for is the
values bound in `Launch`, the dtypes of the pointers, which its owner keeps the same, and whether pointers are aligned
to 16 bytes, which is looked at here. The first launch, and every launch with a pointer that is not aligned, goes
through Triton; so does everything in Triton's interpreter. This file must not know what any kernel computes.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.runtime import driver

from fusedhead.kernels.triton_engine.launch.launcher import Recorded, hooked, recorded

ALIGNED = 16  # bytes: what Triton specialises a pointer on
ENCODED = 64  # sets of descriptors that a launch remembers: the allocator hands out the same memory again


def on_device(x: Tensor) -> AbstractContextManager[object]:
    """Kernels launch on the current device: make it that of x."""
    if x.device.type != "cuda" or x.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(x.device)


class Placed(NamedTuple):
    """A matrix that a kernel reads or writes through a descriptor, which is made when it is needed."""

    tiles: Any  # how it lies: ``tiles.at(base)`` is its descriptor. Compared by identity
    base: Tensor

    def data_ptr(self) -> int:
        return self.base.data_ptr()


class Launch:
    """One kernel on one grid of one device, with all arguments bound but the leading ones.

    ``bound`` holds the values of the remaining parameters by name, and options (num_warps, ...). Leading arguments
    are tensors and `Placed` matrices, then numbers, which must not be specialised by the kernel.
    """

    __slots__ = ("again", "bound", "device", "encoded", "first", "grid", "kernel", "options", "placed", "tensors")

    def __init__(self, kernel: Any, grid: tuple[int, int, int], bound: dict[str, Any]) -> None:
        names = kernel.arg_names
        leading = next((at for at, name in enumerate(names) if name in bound), len(names))
        self.kernel, self.grid = kernel, grid
        self.bound = tuple(bound[name] for name in names[leading:])
        given = {name: value for name, value in bound.items() if name.startswith("num_") or name == "maxnreg"}
        self.options = {"enable_fp_fusion": True, **given}  # said, since Triton's default changes with its version
        self.placed: tuple[int, ...] = ()  # which of the leading arguments are placed
        self.first = self.tensors = self.device = 0  # arguments up to the last placed one, and up to the last tensor
        self.encoded: dict[tuple[Any, ...], tuple[Any, ...]] = {}  # the first arguments as C takes them
        self.again: Recorded | Callable[..., None] | None = None  # what Triton compiled, for aligned pointers

    def __call__(self, *leading: Any) -> None:
        again = self.again
        if again is not None and not hooked():
            given, numbers = [x.data_ptr() for x in leading[: self.tensors]], leading[self.tensors :]
            if not functools.reduce(operator.or_, given) % ALIGNED:
                # an address is passed on as it is; of a tensor the driver would be asked whether it is one of its own
                stream = driver.active.get_current_stream(self.device)
                if not isinstance(again, Recorded):
                    first = _described(leading[: self.first])
                    again(*first, *given[self.first :], *numbers, *self.bound, stream=stream)
                    return
                call, grid, fixed, as_tuple, *_ = again
                if self.placed:
                    given[: self.first] = self._encoded(leading, given, again)
                if as_tuple:
                    call(*grid, stream, *fixed, (*given, *numbers, *self.bound))
                else:
                    call(*grid, stream, *fixed, *given, *numbers, *self.bound)
                return
        self._through_triton(leading)

    def _encoded(self, leading: Sequence[Any], given: list[int], again: Recorded) -> Any:
        """The arguments up to the last that is placed, as C takes them."""
        key = (*given[: self.first], *[leading[at].tiles for at in self.placed])
        found = self.encoded.get(key)
        if found is None:
            first = [x.data_ptr() if isinstance(x, Tensor) else x for x in _described(leading[: self.first])]
            others = (*given[self.first :], *leading[self.tensors :], *self.bound)
            found = tuple(again.encode((*first, *others))[: -len(others)])
            if len(self.encoded) >= ENCODED:
                self.encoded.clear()
            self.encoded[key] = found
        return found

    def _through_triton(self, leading: Sequence[Any]) -> None:
        """A launch as any other, of which is remembered what Triton compiled, unless it interprets the kernel."""
        given = (*_described(leading), *self.bound)
        compiled = self.kernel[self.grid](*given, **self.options)
        tensors = [x for x in leading if isinstance(x, (Placed, Tensor))]
        if compiled is not None and all(x.data_ptr() % ALIGNED == 0 for x in tensors):
            self.placed = tuple(at for at, x in enumerate(leading) if isinstance(x, Placed))
            self.first, self.tensors = 1 + max(self.placed, default=-1), len(tensors)
            self.device = driver.active.get_current_device()
            self.again = recorded(compiled, self.grid, given) or compiled[self.grid]


def _described(leading: Sequence[Any]) -> list[Any]:
    return [x.tiles.at(x.base) if isinstance(x, Placed) else x for x in leading]
