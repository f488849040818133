"""Run-time counts of compiled graphs, which the report reads at the end.

A graph counts its calls by the values of its symbolic sizes. A head counts how often its logits were returned deferred,
how often a loss was computed without building them, and which uses built them. A count is one operation of the
interpreter: no cost in a step can be measured, no lock is needed, it survives a fork, and threads lose no count.
"""

from __future__ import annotations

import itertools
import logging
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

log = logging.getLogger("fusedhead")
MOST_USES = 64  # distinct keys counted
MOST_SIZES = 4096
ELSEWHERE = "elsewhere"
UNNAMED = "a backward, or another graph"
LIBRARIES = ("fusedhead", "torch")  # packages whose frames belong to no program


class Tally:
    """A counter that threads may increment at once: ``tally.add()``."""

    def __init__(self, start: int = 0) -> None:
        steps = itertools.count()
        self.add: Callable[[], int] = steps.__next__
        self.looking = threading.Lock()
        self.looks = 0  # reading advances the counter too
        self.start = start

    @property
    def value(self) -> int:
        with self.looking:
            value = self.add() - self.looks
            self.looks += 1
        return self.start + value

    def take_back(self) -> None:
        """Undo one ``add``."""
        with self.looking:
            self.start -= 1

    def __reduce__(self) -> tuple[Callable[[int], Tally], tuple[int]]:
        """A copy or a pickle starts with the current count."""
        return Tally, (self.value,)

    def __repr__(self) -> str:
        return f"Tally({self.value})"


class Tallies:
    """Counts by key, for a limited number of keys."""

    def __init__(self, rest: Any, most: int) -> None:
        self.rest, self.most = rest, most
        self.known: dict[Any, Tally] = {}

    def add(self, key: Any) -> None:
        tally = self.known.get(key)
        if tally is None:
            tally = self.known.setdefault(key if len(self.known) < self.most else self.rest, Tally())
        tally.add()

    def items(self) -> list[tuple[Any, int]]:
        return [(key, tally.value) for key, tally in list(self.known.items())]

    @property
    def total(self) -> int:
        return sum(count for _, count in self.items())


class Use(NamedTuple):
    """A use for which deferred logits were built."""

    name: str  # name of the function, "setitem", or the reason where there is none
    where: str  # "train.py:12" of the program's line, "" where no line of it is running (a backward on another thread)

    def __str__(self) -> str:
        return f"{self.name} at {self.where}" if self.where else self.name


class GraphRun:
    """The calls of one compiled graph, by the values of its inputs that are sizes."""

    def __init__(self) -> None:
        self.calls = Tallies((), MOST_SIZES)
        self.watched = False  # whether calls are counted

    def counted(self, compiled: Callable[..., Any], sizes: Sequence[int]) -> Callable[..., Any]:
        """Wrap ``compiled`` to count its calls. ``sizes``: the indices of the inputs that are sizes."""
        places, calls, self.watched = tuple(sizes), self.calls, True

        def with_its_sizes(*inputs: Any) -> Any:
            calls.add(tuple(inputs[at] for at in places))
            return compiled(*inputs)

        if places:
            return with_its_sizes
        once = calls.known.setdefault((), Tally()).add

        def with_a_count(*inputs: Any) -> Any:
            once()
            return compiled(*inputs)

        return with_a_count


@dataclass(eq=False)
class Run:
    """Counts of one head's logits."""

    graph: GraphRun = field(default_factory=GraphRun)
    deferred: Tally = field(default_factory=Tally)  # returned without being computed
    answered: Tally = field(default_factory=Tally)  # losses and statistics computed without building them
    passed: Tally = field(default_factory=Tally)  # passed to another compiled graph, which has its own report
    # deferred and later built, by `Use`; and never deferred, by reason
    built: Tallies = field(default_factory=lambda: Tallies(Use(ELSEWHERE, ""), MOST_USES))
    at_once: Tallies = field(default_factory=lambda: Tallies(ELSEWHERE, MOST_USES))

    @staticmethod
    def of(runs: Sequence[Run]) -> Run:
        """The current counts of several heads, added up."""
        both = Run()
        for run in runs:
            for name in ("deferred", "answered", "passed"):
                getattr(both, name).start += getattr(run, name).value
            for name in ("built", "at_once"):
                for key, count in getattr(run, name).items():
                    getattr(both, name).known.setdefault(key, Tally()).start += count
            both.graph.watched |= run.graph.watched
            for key, count in run.graph.calls.items():
                both.graph.calls.known.setdefault(key, Tally()).start += count
        return both


def built(runs: Sequence[Run]) -> None:
    """Count that logits are built for a use; each use is logged once."""
    if not runs:
        return
    use = asked_for()
    for run in runs:
        if use not in run.built.known:
            log.info("deferred logits are built for %s", use)
        run.built.add(use)


def asked_for() -> Use:
    """The current use: the function that was called on deferred logits, and the program's line."""
    name = ""
    for frame in _caller_frames():
        package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if package not in LIBRARIES:
            code = frame.f_code
            return Use(name or UNNAMED, f"{code.co_filename.rsplit('/', 1)[-1]}:{frame.f_lineno}")
        if frame.f_code.co_name in ("__torch_function__", "__torch_dispatch__"):
            called = frame.f_locals.get("func")
            name = display_name(str(getattr(called, "__name__", called)), frame.f_locals.get("args"))
    return Use(name or UNNAMED, "")


def display_name(name: str, args: Any) -> str:
    """The display name of a function: an operator without underscores, for ``__get__`` the attribute."""
    if name == "__get__":
        return "an attribute"
    plain = name.removeprefix("aten::").partition(".")[0]
    return plain.strip("_") if plain.startswith("__") else plain


def _caller_frames() -> Iterator[Any]:
    frame = sys._getframe(2)
    while frame is not None:
        yield frame
        frame = frame.f_back  # type: ignore[assignment]


def count_built(runs: Sequence[Run], why: str) -> None:
    """Count built logits: for a use, or at once after all because of ``why``."""
    if not why:
        built(runs)
    for run in runs if why else ():
        run.deferred.take_back()
        run.at_once.add(why)
