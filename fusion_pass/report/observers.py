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
readers: tuple[Observer, ...] = ()  # those of them that want the graphs' texts, which take longer than the pass
changing = threading.Lock()


def add(observer: Observer, texts: bool = True) -> Callable[[], None]:
    """Tell ``observer`` about every graph from now on, with their ``texts``.

    Returns the function that takes it off again.
    """
    global observers, readers
    with changing:
        observers = (*observers, observer)
        readers = (*readers, observer) if texts else readers

    def remove() -> None:
        global observers, readers
        with changing:
            observers = tuple(other for other in observers if other is not observer)
            readers = tuple(other for other in readers if other is not observer)

    return remove


def notify(report: Report) -> None:
    """Hand ``report`` to every observer. What an observer raises is logged, not raised."""
    for observer in observers:
        try:
            observer(report)
        except Exception:
            log.exception("fusedhead: an observer of reports failed")
