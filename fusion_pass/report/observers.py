"""Observers: callables that get the `Report` of every compiled graph.

`explain` reports on one compilation; an observer gets all of them, from any thread. An error of an observer does not
break a compilation.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from fusedhead.report.report import Report

log = logging.getLogger("fusedhead")

Observer = Callable[[Report], None]
observers: tuple[Observer, ...] = ()  # replaced as a whole, so that reading needs no lock
readers: tuple[Observer, ...] = ()  # those that read the graphs' texts, which take longer to print than the pass
changing = threading.Lock()


def add(observer: Observer, texts: bool = True) -> Callable[[], None]:
    """Call ``observer`` with the report of every graph from now on. ``texts``: with the graphs' texts.

    Returns the function that removes it.
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
    """Call every observer with ``report``. Errors of observers are logged and not raised."""
    for observer in observers:
        try:
            observer(report)
        except Exception:
            log.exception("fusedhead: an observer of reports failed")
