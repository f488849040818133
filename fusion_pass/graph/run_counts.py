"""What happened when compiled graphs were run: counts that reports are read from at the end.

A graph counts its calls by the sizes that were symbols when it was compiled. A head counts the logits that were handed
out deferred, how often they were answered for, and by what use they had to be built. Counting must cost a step nothing
that shows: it is one operation of the interpreter, which needs no lock, survives a fork, and loses nothing to threads.
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
MOST_USES = 64  # that are told apart
MOST_SIZES = 4096
ELSEWHERE = "elsewhere"
UNNAMED = "a backward, or another graph"
LIBRARIES = ("fusedhead", "torch")  # whose frames are no program's


class Tally:
    """A count that threads may add to at once: ``tally.add()``."""

    def __init__(self) -> None:
        steps = itertools.count()
        self.add: Callable[[], int] = steps.__next__
        self.looking = threading.Lock()
        self.looks = 0  # looking takes a step too
        self.start = 0

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

    def __repr__(self) -> str:
        return f"Tally({self.value})"


class Tallies:
    """Counts by key, of which only so many are told apart."""

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
    """What asked for logits that were deferred."""

    name: str  # of the function, "setitem", or why none was needed
    where: str  # "train.py:12" of the program's line, "" where no line of it is running (a backward on another thread)

    def __str__(self) -> str:
        return f"{self.name} at {self.where}" if self.where else self.name


class GraphRun:
    """The calls of one compiled graph, by the values of its inputs that are sizes."""

    def __init__(self) -> None:
        self.calls = Tallies((), MOST_SIZES)
        self.watched = False  # whether calls are counted

    def counted(self, compiled: Callable[..., Any], sizes: Sequence[int]) -> Callable[..., Any]:
        """``compiled``, counting its calls; ``sizes`` are the places of the inputs that are sizes."""
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
    """What became of one head's logits."""

    graph: GraphRun = field(default_factory=GraphRun)
    deferred: Tally = field(default_factory=Tally)  # handed out without being computed
    answered: Tally = field(default_factory=Tally)  # losses and statistics of them that were computed without them
    passed: Tally = field(default_factory=Tally)  # handed to another compiled graph, which has a report of its own
    # deferred and then computed, by `Use`; and never deferred, by the reason
    built: Tallies = field(default_factory=lambda: Tallies(Use(ELSEWHERE, ""), MOST_USES))
    at_once: Tallies = field(default_factory=lambda: Tallies(ELSEWHERE, MOST_USES))

    @staticmethod
    def of(runs: Sequence[Run]) -> Run:
        """The counts of several together, as they are now."""
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
    """Tell the heads of logits that are being built what for; the log hears of every use once."""
    if not runs:
        return
    use = asked_for()
    for run in runs:
        if use not in run.built.known:
            log.info("deferred logits are built for %s", use)
        run.built.add(use)


def asked_for() -> Use:
    """The use that is going on: the function that was called on deferred logits, and the program's line."""
    name = ""
    for frame in _caller_frames():
        package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if package not in LIBRARIES:
            code = frame.f_code
            return Use(name or UNNAMED, f"{code.co_filename.rsplit('/', 1)[-1]}:{frame.f_lineno}")
        if frame.f_code.co_name in ("__torch_function__", "__torch_dispatch__"):
            called = frame.f_locals.get("func")
            name = spoken(str(getattr(called, "__name__", called)), frame.f_locals.get("args"))
    return Use(name or UNNAMED, "")


def spoken(name: str, args: Any) -> str:
    """A function's name without the underscores of an operator; ``__get__`` is an attribute's."""
    if name == "__get__":
        return "an attribute"
    plain = name.removeprefix("aten::").partition(".")[0]
    return plain.strip("_") if plain.startswith("__") else plain


def _caller_frames() -> Iterator[Any]:
    frame = sys._getframe(2)
    while frame is not None:
        yield frame
        frame = frame.f_back  # type: ignore[assignment]
