"""Recorded launches: the arguments that Triton's launcher passes to its C function, so that a later launch is one call.

Between ``kernel[grid](...)`` and C a launch runs Python that recomputes values fixed at compile time and encodes each
tensor descriptor again. The results depend only on the kernel, the grid and the addresses of the descriptors. A
launcher of unknown form is not recorded.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from copy import copy
from typing import Any, NamedTuple

from triton import knobs

Grid = tuple[int, int, int]
STREAM = 0  # stands for a launch's own while the launcher is asked


class RecordedLaunch(NamedTuple):
    """A C function's arguments: grid, stream, ``fixed``, then the kernel's, one by one or as one tuple."""

    call: Callable[..., object]
    grid: Grid
    fixed: tuple[Any, ...]
    as_tuple: bool
    encode: Callable[[Sequence[Any]], Sequence[Any]]  # a kernel's arguments -> as C takes them
    compiled: Any  # keeps the kernel loaded: newer Tritons unload one that nobody holds


def hooked() -> bool:
    """Whether somebody (a profiler) is told of launches, which then have to go through Triton."""
    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def _on_top(launch: Any) -> tuple[Any, Callable[[Callable], Callable]]:
    """The function below a launcher's ``launch``, and what puts that on top of another: it may encode descriptors."""
    names = getattr(getattr(launch, "__code__", None), "co_freevars", ())
    if "launcher" not in names:
        return launch, lambda other: other
    cells, at = launch.__closure__, names.index("launcher")

    def on_top(other: Callable) -> Callable:
        own = (*cells[:at], types.CellType(other), *cells[at + 1 :])
        return types.FunctionType(launch.__code__, launch.__globals__, launch.__name__, None, own)

    return cells[at].cell_contents, on_top


def recorded(compiled: Any, grid: Grid, args: Sequence[Any]) -> RecordedLaunch | None:
    """How what Triton compiled is launched on ``grid`` with arguments like ``args``; None if that is not understood."""
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
    workspace = any(hasattr(x, "data_ptr") for x in before)  # of this launch alone
    if before[:4] != (*grid, STREAM) or workspace or not as_they_are:
        return None

    def encode(given: Sequence[Any]) -> Sequence[Any]:
        reached: list[tuple[Any, ...]] = []
        on_top(lambda *passed: reached.append(passed))(*before, *((tuple(given),) if as_tuple else given))
        return reached[0][-1] if as_tuple else reached[0][len(before) :]

    return RecordedLaunch(call, grid, before[4:], as_tuple, encode, compiled)
