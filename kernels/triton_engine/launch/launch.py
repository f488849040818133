"""Launches of a kernel that skip Triton's dispatch after the first time.

Triton inspects every argument of every launch to find the compiled kernel. That kernel depends on the values bound in
`Launch`, on the dtypes of the pointers, which the owner of a `Launch` never changes, and on whether pointers are
aligned to 16 bytes, which is checked here. The first launch, a launch with an unaligned pointer, and all launches in
Triton's interpreter go through Triton.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from math import gcd
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.runtime import driver

from fusedhead.kernels.triton_engine.launch.launcher import RecordedLaunch, hooked, recorded

POINTER_ALIGNMENT = 16  # bytes; Triton compiles one kernel for aligned and one for unaligned pointers
ENCODED = 64  # encoded descriptors that a launch remembers, since the allocator returns the same addresses again


def on_device(x: Tensor) -> AbstractContextManager[object]:
    """A context in which kernels launch on the device of x: Triton launches on the current device."""
    if x.device.type != "cuda" or x.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(x.device)


class Placed(NamedTuple):
    """A matrix that a kernel accesses through a TMA descriptor, which is made only when a launch needs it."""

    tiles: Any  # its layout, compared by identity; ``tiles.at(base)`` makes the descriptor
    base: Tensor

    def data_ptr(self) -> int:
        return self.base.data_ptr()


class Launch:
    """One kernel on one grid of one device. All arguments but the leading ones are bound.

    ``bound`` maps the other parameters to their values; it also holds options (num_warps, ...), and names that the
    kernel does not have are ignored. `run` takes the leading arguments by name: tensors and `Placed` matrices, then
    numbers that the kernel does not specialise on. A pointer that the kernel's constants tell it not to read is None,
    in every call: the address of another tensor is passed in its place.
    """

    __slots__ = (
        "again", "bound", "device", "encoded", "first", "grid", "kernel", "leading", "numbers", "options", "order",
        "placed", "tensors",
    )  # fmt: skip

    def __init__(self, kernel: Any, grid: tuple[int, int, int], bound: dict[str, Any]) -> None:
        names = kernel.arg_names
        count = next((at for at, name in enumerate(names) if name in bound), len(names))
        self.kernel, self.grid, self.leading = kernel, grid, tuple(names[:count])
        self.bound = tuple(bound[name] for name in names[count:])
        settings = {name: value for name, value in bound.items() if name.startswith("num_") or name == "maxnreg"}
        self.options = {"enable_fp_fusion": True, **settings}  # explicit, since Triton's default differs by version
        self.placed: tuple[int, ...] = ()  # the positions of the `Placed` arguments among the leading ones
        self.first = self.device = 0  # ``first``: how many arguments there are up to the last `Placed` one
        self.tensors: Callable[[Mapping[str, Any]], tuple[Any, ...]]  # picks the leading tensors, each of them once
        self.order: Callable[[list[int]], tuple[int, ...]] | None = None  # their addresses in the order of parameters
        self.numbers: tuple[str, ...] = ()  # the names of the leading numbers
        self.encoded: dict[tuple[Any, ...], tuple[Any, ...]] = {}  # the first ``first`` arguments in C's form
        self.again: RecordedLaunch | Callable[..., None] | None = None  # the compiled kernel for aligned pointers

    def run(self, **arguments: Any) -> None:
        again = self.again
        if again is not None and not hooked():
            tensors = self.tensors(arguments)
            addresses = [x.data_ptr() for x in tensors]
            if not gcd(*addresses) % POINTER_ALIGNMENT:
                if self.order is not None:
                    addresses = [*self.order(addresses)]
                # addresses and not tensors: for a tensor Triton asks the driver whether the pointer is a device's
                numbers = [arguments[name] for name in self.numbers] if self.numbers else ()
                stream = driver.active.get_current_stream(self.device)
                if not isinstance(again, RecordedLaunch):
                    first = _described(tensors[: self.first])
                    again(*first, *addresses[self.first :], *numbers, *self.bound, stream=stream)
                    return
                call, grid, fixed, as_tuple, *_ = again
                if self.placed:
                    addresses[: self.first] = self._encoded(tensors, addresses, numbers, again)
                if as_tuple:
                    call(*grid, stream, *fixed, (*addresses, *numbers, *self.bound))
                else:
                    call(*grid, stream, *fixed, *addresses, *numbers, *self.bound)
                return
        self._through_triton(arguments)

    def _encoded(
        self, tensors: Sequence[Any], addresses: Sequence[int], numbers: Sequence[Any], again: RecordedLaunch
    ) -> Any:
        """The arguments up to the last `Placed` one, in the form that Triton's C launcher takes."""
        key = (*addresses[: self.first], *[tensors[at].tiles for at in self.placed])
        encoded = self.encoded.get(key)
        if encoded is None:
            first = [x.data_ptr() if isinstance(x, Tensor) else x for x in _described(tensors[: self.first])]
            constants = (*addresses[self.first :], *numbers, *self.bound)
            encoded = tuple(again.encode((*first, *constants))[: -len(constants)])
            if len(self.encoded) >= ENCODED:
                self.encoded.clear()
            self.encoded[key] = encoded
        return encoded

    def _through_triton(self, named: Mapping[str, Any]) -> None:
        """Launch through Triton, and remember the kernel that it compiled; the interpreter compiles none."""
        names = self._sources(named)
        leading = [named[name] for name in names]
        arguments = (*_described(leading), *self.bound)
        compiled = self.kernel[self.grid](*arguments, **self.options)
        tensors = [x for x in leading if isinstance(x, (Placed, Tensor))]
        if compiled is not None and all(x.data_ptr() % POINTER_ALIGNMENT == 0 for x in tensors):
            self.placed = tuple(at for at, x in enumerate(leading) if isinstance(x, Placed))
            self.first = 1 + max(self.placed, default=-1)
            self._remember(names[: len(tensors)])
            self.numbers = names[len(tensors) :]
            self.device = driver.active.get_current_device()
            self.again = recorded(compiled, self.grid, arguments) or compiled[self.grid]

    def _remember(self, names: tuple[str, ...]) -> None:
        """Remember how a later call finds the tensors of these names; one that stands in for others is read once."""
        once = tuple(dict.fromkeys(names))
        if once[: self.first] != names[: self.first]:
            once = names
        self.tensors = _picking(once)
        self.order = operator.itemgetter(*map(once.index, names)) if len(once) < len(names) else None

    def _sources(self, arguments: Mapping[str, Any]) -> tuple[str, ...]:
        """For each leading argument the name of the value to pass: its own, or a tensor's for an absent pointer."""
        present = [name for name in self.leading if arguments.get(name) is not None]
        stand_in = next((name for name in present if isinstance(arguments[name], Tensor)), None)
        if stand_in is None and len(present) < len(self.leading):
            raise TypeError(f"{self.kernel} needs {', '.join(self.leading)}; given were {', '.join(present)}")
        return tuple(name if name in present else str(stand_in) for name in self.leading)


def _picking(names: tuple[str, ...]) -> Callable[[Mapping[str, Any]], tuple[Any, ...]]:
    """A function that takes a mapping and returns the values of these names as a tuple."""
    return operator.itemgetter(*names) if len(names) > 1 else lambda arguments: tuple(arguments[name] for name in names)


def _described(leading: Sequence[Any]) -> list[Any]:
    return [x.tiles.at(x.base) if isinstance(x, Placed) else x for x in leading]
