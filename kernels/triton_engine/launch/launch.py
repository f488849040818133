"""Repeated launches of a kernel, without Triton's look-up of facts that cannot have changed.

Triton inspects every argument of every launch to find the compiled kernel. A kernel is compiled for the values bound in
`Launch`, the dtypes of the pointers, which its owner keeps the same, and the alignment of pointers to 16 bytes, which
is checked here. The first launch, every launch with an unaligned pointer, and every launch in Triton's interpreter go
through Triton.
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

POINTER_ALIGNMENT = 16  # bytes: what Triton specialises a pointer on
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
    are tensors and `Placed` matrices, then numbers, which must not be specialised by the kernel. It is run
    with these by name. Names that the kernel does not have are left out. Pointers that its constants tell it not to
    read are None, in every call: another tensor's address stands in for them.
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
        self.options = {"enable_fp_fusion": True, **settings}  # said, since Triton's default changes with its version
        self.placed: tuple[int, ...] = ()  # which of the leading arguments are placed
        self.first = self.device = 0  # arguments up to the last placed one
        self.tensors: Callable[[Mapping[str, Any]], tuple[Any, ...]]  # picks the leading tensors, each of them once
        self.order: Callable[[list[int]], tuple[int, ...]] | None = None  # puts addresses where they are passed
        self.numbers: tuple[str, ...] = ()  # the leading numbers
        self.encoded: dict[tuple[Any, ...], tuple[Any, ...]] = {}  # the first arguments as C takes them
        self.again: RecordedLaunch | Callable[..., None] | None = None  # what Triton compiled, for aligned pointers

    def run(self, **arguments: Any) -> None:
        again = self.again
        if again is not None and not hooked():
            tensors = self.tensors(arguments)
            addresses = [x.data_ptr() for x in tensors]
            if not gcd(*addresses) % POINTER_ALIGNMENT:
                if self.order is not None:
                    addresses = [*self.order(addresses)]
                # an address is passed on as it is; of a tensor the driver would be asked whether it is one of its own
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
        """The arguments up to the last that is placed, as C takes them."""
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
        """A launch as any other, of which is remembered what Triton compiled, unless it interprets the kernel."""
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
        """How the tensors of these names are found in a later call. Addresses of stand-ins are not asked for twice."""
        once = tuple(dict.fromkeys(names))
        if once[: self.first] != names[: self.first]:
            once = names
        self.tensors = _picking(once)
        self.order = operator.itemgetter(*map(once.index, names)) if len(once) < len(names) else None

    def _sources(self, arguments: Mapping[str, Any]) -> tuple[str, ...]:
        """For each leading argument the name of what is passed: its own, or for an absent pointer another's."""
        present = [name for name in self.leading if arguments.get(name) is not None]
        stand_in = next((name for name in present if isinstance(arguments[name], Tensor)), None)
        if stand_in is None and len(present) < len(self.leading):
            raise TypeError(f"{self.kernel} needs {', '.join(self.leading)}; given were {', '.join(present)}")
        return tuple(name if name in present else str(stand_in) for name in self.leading)


def _picking(names: tuple[str, ...]) -> Callable[[Mapping[str, Any]], tuple[Any, ...]]:
    """Picks the values of several names out of a mapping, as a tuple."""
    return operator.itemgetter(*names) if len(names) > 1 else lambda arguments: tuple(arguments[name] for name in names)


def _described(leading: Sequence[Any]) -> list[Any]:
    return [x.tiles.at(x.base) if isinstance(x, Placed) else x for x in leading]
