"""Runs Gluon kernels of pairs (`gluon.ring`) on the CPU, three threads a program: Gluon has no interpreter.

The source that Triton would compile is called as Python, with stand-ins for the language: tensors are torch's,
shared memory is one tensor a buffer, and what runs asynchronously on the chip happens as late as it may. A product
reads its operands when it is waited for, a store leaves shared memory when its group is waited for, so that a stage
that is given away too early, or a half that is written too early, shows in the numbers. Barriers have the chip's two
phases and nothing else: a group that waits for a fill too far ahead, or arrives once too often, fails or waits forever,
which a deadline turns into an error. Layouts, registers and speed are not looked at.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from inspect import signature
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

SECONDS = 20.0  # after which a program counts as waiting forever
local = threading.local()


class Barrier:
    """An mbarrier: phases that end when all arrivals and bytes that were expected are there."""

    def __init__(self) -> None:
        self.phase, self.count, self.pending, self.bytes = 0, 0, 0, 0
        self.changed = threading.Condition()

    def init(self, count: int) -> None:
        self.count = self.pending = count

    def _step(self, arrivals: int, bytes_: int) -> None:
        with self.changed:
            self.pending -= arrivals
            self.bytes += bytes_
            assert self.pending >= 0, "more arrivals than a phase expects"
            if self.pending == 0 and self.bytes == 0:
                self.phase, self.pending = self.phase ^ 1, self.count
            self.changed.notify_all()

    def wait(self, phase: int) -> None:
        """Until the phase of this parity is over: at once where the one that runs is of the other parity."""
        end = time.monotonic() + SECONDS
        with self.changed:
            while self.phase == phase:
                assert self.changed.wait(max(0.0, end - time.monotonic())), "a barrier that nobody arrives at"


class Shared:
    """A buffer of shared memory, or a part of one."""

    def __init__(self, data: Tensor) -> None:
        self.data = data
        self.barriers: list[Barrier] = []

    def index(self, at: Any) -> Any:
        return self.barriers[int(at)] if self.barriers else Shared(self.data[int(at)])

    def slice(self, start: int, length: int) -> Shared:
        return Shared(self.data[start : start + length])

    def permute(self, order: tuple[int, ...]) -> Shared:
        return Shared(self.data.permute(order))

    def store(self, values: Tensor) -> None:
        self.data.copy_(values)


class Pointer:
    """Addresses of elements of a flat tensor."""

    def __init__(self, data: Tensor, at: Any = 0) -> None:
        self.data, self.at = data, at

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.data, self.at + offset)


class Descriptor:
    """A matrix that TMA reads and writes in tiles; past its end there are zeros, and writes are lost."""

    layout = None

    def __init__(self, data: Tensor) -> None:
        self.data, self.dtype = data, data.dtype

    def _inside(self, corner: Any, shape: Sequence[int]) -> Tensor:
        (r, c), (m, n) = (int(x) for x in corner), shape
        return self.data[r : r + m, c : c + n]

    def read(self, corner: Any, shape: Sequence[int]) -> Tensor:
        found = self._inside(corner, shape)
        return torch.nn.functional.pad(found, (0, shape[1] - found.shape[1], 0, shape[0] - found.shape[0]))

    def write(self, corner: Any, values: Tensor) -> None:
        to = self._inside(corner, values.shape)
        to.copy_(values[: to.shape[0], : to.shape[1]])


class Accumulator:
    """What products still in flight will have added; they read shared memory when they are waited for."""

    def __init__(self, value: Tensor, flying: list[tuple[Shared, Shared, bool]]) -> None:
        self.value, self.flying = value, flying

    def land(self, left: int) -> Accumulator:
        value, flying = self.value, list(self.flying)
        while len(flying) > left:
            a, b, add = flying.pop(0)
            product = a.data.float() @ b.data.float()
            value = value + product if add else product
        return Accumulator(value, flying)


def _doze() -> None:
    """Lets another thread run at a point where the chip might."""
    if local.random.random() < 0.2:
        time.sleep(1e-5)


def _mma(a: Shared, b: Shared, acc: Any, use_acc: Any, is_async: bool) -> Accumulator:
    had = acc if isinstance(acc, Accumulator) else Accumulator(acc, [])
    return Accumulator(had.value, [*had.flying, (a, b, bool(use_acc))])


def _mma_wait(num_outstanding: int, deps: tuple[Accumulator, ...]) -> tuple[Any, ...]:
    _doze()
    each = num_outstanding // len(deps)
    landed = tuple(x.land(each) if isinstance(x, Accumulator) else x for x in deps)
    return tuple(x.value if each == 0 and isinstance(x, Accumulator) else x for x in landed)


def _load(at: Pointer, mask: Any = True, other: Any = 0) -> Tensor:
    where, mask = torch.broadcast_tensors(torch.as_tensor(at.at), torch.as_tensor(mask))
    found = at.data[torch.where(mask, where, 0).long()]
    return torch.where(mask, found, torch.as_tensor(other, dtype=found.dtype))


def _store(at: Pointer, values: Tensor, mask: Any = True) -> None:
    where, values, mask = torch.broadcast_tensors(torch.as_tensor(at.at), values, torch.as_tensor(mask))
    data = at.data
    if values.itemsize == 1:  # torch does not index float8
        data, values = data.view(torch.uint8), values.view(torch.uint8)
    data[where[mask].long()] = values[mask]


def _store_wait(pendings: int) -> None:
    while len(local.stores) > pendings:
        descriptor, corner, half = local.stores.pop(0)
        descriptor.write(corner, half.data)


def _async_load(descriptor: Descriptor, corner: Any, barrier: Barrier, to: Shared) -> None:
    _doze()
    to.store(descriptor.read(corner, to.data.shape))
    barrier._step(0, -to.data.numel() * to.data.itemsize)


def _fma(a: Tensor, b: float, c: Tensor) -> Tensor:
    return (a.double() * b + c).float()


def _allocate(dtype: torch.dtype, shape: Sequence[int], layout: object) -> Shared:
    made = Shared(torch.full(tuple(int(x) for x in shape), 0 if dtype == torch.int64 else float("nan"), dtype=dtype))
    if dtype == torch.int64:
        made.barriers = [Barrier() for _ in range(int(shape[0]))]
    return made


def _rounded(asm: str, constraints: str, args: list[Tensor], **more: Any) -> Tensor:
    """`float8_exponentials.rounded_or_marked`, the one inline assembly there is."""
    assert "cvt.rn.satfinite.e4m3x2.f32" in asm
    found = args[0].clamp(max=448).to(torch.float8_e4m3fn).view(torch.uint8)
    return torch.where(found >= 0x7E, 0x80, found.int()).to(torch.uint8)


def _specialize(functions_and_args: list[Any], warps: Any, registers: Any) -> None:
    """Every partition in a thread of its own."""
    failed: list[BaseException] = []
    program = local.program

    def run(number: int, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        local.program, local.stores, local.random = program, [], random.Random(7 * program + number)
        try:
            function(*args)
            assert not local.stores, "stores that nobody waited for"
        except BaseException as problem:
            failed.append(problem)

    threads = [threading.Thread(target=run, args=(n, *x), daemon=True) for n, x in enumerate(functions_and_args)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]


def _both(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *given: function(*(torch.as_tensor(x) for x in given))


def _language() -> dict[str, Any]:
    """What stands for ``gl`` and for ``tl``."""
    return {
        "constexpr": None, "float32": torch.float32, "int64": torch.int64, "int32": torch.int32,
        "uint8": torch.uint8, "inline_asm_elementwise": _rounded,
        "num_warps": lambda: 4, "program_id": lambda axis: local.program,
        "BlockedLayout": lambda *x: None, "SliceLayout": lambda *x: None,
        "zeros": lambda shape, dtype, layout=None: torch.zeros(shape, dtype=dtype),
        "full": lambda shape, value, dtype, layout=None: torch.full(shape, value, dtype=dtype),
        "arange": lambda start, end, layout=None: torch.arange(start, end, dtype=torch.int32),
        "convert_layout": lambda x, layout, assert_trivial=False: x,
        "cdiv": lambda a, b: -(-a // b), "where": lambda c, a, b: torch.where(torch.as_tensor(c), a, b),
        "maximum": _both(torch.maximum), "minimum": _both(torch.minimum), "abs": torch.abs, "exp2": torch.exp2,
        "fma": _fma, "static_range": range, "load": _load, "store": _store,
        "sum": lambda x, axis: x.sum(axis).to(x.dtype), "max": lambda x, axis: x.amax(axis),
        "reshape": torch.reshape, "permute": torch.permute, "split": lambda x: x.unbind(-1),
        "allocate_shared_memory": _allocate, "warp_specialize": _specialize,
    }  # fmt: skip


def _called(modules: tuple[ModuleType, ...]) -> Iterator[tuple[ModuleType, dict[str, Any]]]:
    language = SimpleNamespace(**_language())
    mbarrier = SimpleNamespace(
        MBarrierLayout=lambda: None,
        init=lambda barrier, count: barrier.init(count),
        wait=lambda barrier, phase: (_doze(), barrier.wait(int(phase))),
        expect=lambda barrier, bytes_: barrier._step(1, int(bytes_)),
        arrive=lambda barrier, count: barrier._step(count, 0),
    )
    fixed = {
        "gl": language, "tl": language, "mbarrier": mbarrier, "fence_async_shared": lambda: None,
        "tma": SimpleNamespace(store_wait=_store_wait), "async_load": _async_load, "warpgroup_mma": _mma,
        "async_store": lambda descriptor, corner, half: local.stores.append((descriptor, corner, half)),
        "warpgroup_mma_wait": _mma_wait,
    }  # fmt: skip
    for module in modules:
        names = vars(module)
        own = {name: x.fn for name, x in names.items() if hasattr(x, "fn") and hasattr(x, "arg_names")}
        values = {name: x.value for name, x in names.items() if type(x).__name__ == "constexpr"}
        yield module, own | values | {name: x for name, x in fixed.items() if name in names}


def run(kernel: Callable[..., None], programs: int, leading: Sequence[Any], bound: dict[str, Any]) -> None:
    """A kernel, inside `on_cpu`, program after program; ``bound`` holds the arguments after ``leading`` by name."""
    names = list(signature(kernel).parameters)[len(leading) :]
    given = [flat(x) if isinstance(x, Tensor) else x for x in leading]
    for program in range(programs):
        local.program = program
        kernel(*given, *(bound[name] for name in names))


@contextmanager
def on_cpu(*modules: ModuleType) -> Iterator[None]:
    """Inside, kernels of these modules, and functions that they share, are Python functions."""
    with ExitStack() as stack:
        for module, names in _called(modules):
            stack.enter_context(patch.multiple(module, **names))
        yield


def flat(x: Tensor) -> Pointer:
    return Pointer(x.view(-1))
