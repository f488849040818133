"""Who is told about every compiled graph: a list of callables, each given the graph's `Report`.

`explain` asks for one compilation; an observer hears of all of them, from any thread. An error of an observer breaks
no compilation.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from fusedhead.report.report import Report

log = logging.getLogger("fusedhead")

Observer = Callable[[Report], None]
observers: tuple[Observer, ...] = ()  # replaced as a whole, so that a reader needs no lock
changing = threading.Lock()


def add(observer: Observer) -> Callable[[], None]:
    """Tell ``observer`` about every graph from now on. Returns the function that takes it off again."""
    global observers
    with changing:
        observers = (*observers, observer)

    def remove() -> None:
        global observers
        with changing:
            observers = tuple(other for other in observers if other is not observer)

    return remove


def notify(report: Report) -> None:
    """Hand ``report`` to every observer. What an observer raises is logged, not raised."""
    for observer in observers:
        try:
            observer(report)
        except Exception:
            log.exception("fusedhead: an observer of reports failed")
