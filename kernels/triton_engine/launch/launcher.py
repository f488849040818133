"""Recorded launches: a later launch calls Triton's C function directly, with the arguments recorded from the first.

Between ``kernel[grid](...)`` and that function Triton runs Python, which computes again what is fixed at compile time
and encodes each tensor descriptor. The outcome depends only on the kernel, the grid and the descriptors' addresses. A
launcher of a form that is not known here is not recorded.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from copy import copy
from typing import Any, NamedTuple

from triton import knobs

Grid = tuple[int, int, int]
STREAM = 0  # the stream passed while recording; a launch passes its own


class RecordedLaunch(NamedTuple):
    """The C function and its arguments: grid, stream, ``fixed``, then the kernel's, one by one or as one tuple."""

    call: Callable[..., object]
    grid: Grid
    fixed: tuple[Any, ...]
    as_tuple: bool
    encode: Callable[[Sequence[Any]], Sequence[Any]]  # a kernel's arguments -> the same in C's form
    compiled: Any  # a reference that keeps the kernel loaded: newer versions of Triton unload an unreferenced one


def hooked() -> bool:
    """True if a launch hook is set, say by a profiler: launches then go through Triton, which calls the hooks."""
    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def _on_top(launch: Any) -> tuple[Any, Callable[[Callable], Callable]]:
    """(the C function, a wrapper): ``launch`` may be a Python closure over C that encodes descriptors.

    ``wrapper(other)`` is that closure over ``other`` in place of C; where ``launch`` is C itself, it is ``other``.
    """
    names = getattr(getattr(launch, "__code__", None), "co_freevars", ())
    if "launcher" not in names:
        return launch, lambda other: other
    cells, at = launch.__closure__, names.index("launcher")

    def on_top(other: Callable) -> Callable:
        own = (*cells[:at], types.CellType(other), *cells[at + 1 :])
        return types.FunctionType(launch.__code__, launch.__globals__, launch.__name__, None, own)

    return cells[at].cell_contents, on_top


def recorded(compiled: Any, grid: Grid, args: Sequence[Any]) -> RecordedLaunch | None:
    """The recorded launch of a compiled kernel on ``grid`` with arguments like ``args``; None for an unknown form."""
    launcher: Any = getattr(compiled, "run", None)
    call, on_top = _on_top(getattr(launcher, "launch", None))
    if call is None or isinstance(call, types.FunctionType):
        return None
    asked: list[tuple[Any, ...]] = []
    asking = copy(launcher)
    asking.launch = lambda *passed: asked.append(passed)
    asking(*grid, STREAM, compiled.function, compiled.packed_metadata, None, None, None, *args)
    (passed,) = asked
    as_tuple = isinstance(passed[-1], tuple) and len(passed[-1]) == len(args)
    before = passed[: -1 if as_tuple else max(0, len(passed) - len(args))]
    given = passed[-1] if as_tuple else passed[len(before) :]
    as_they_are = len(given) == len(args) and all(x is y for x, y in zip(given, args))
    workspace = any(hasattr(x, "data_ptr") for x in before)  # memory that Triton allocates anew for each launch
    if before[:4] != (*grid, STREAM) or workspace or not as_they_are:
        return None

    def encode(given: Sequence[Any]) -> Sequence[Any]:
        reached: list[tuple[Any, ...]] = []
        on_top(lambda *passed: reached.append(passed))(*before, *((tuple(given),) if as_tuple else given))
        return reached[0][-1] if as_tuple else reached[0][len(before) :]

    return RecordedLaunch(call, grid, before[4:], as_tuple, encode, compiled)
