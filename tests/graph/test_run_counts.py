"""Counts of what happened at run time: exact under threads, and added up over heads."""

from __future__ import annotations

import copy
import pickle
import threading

from fusedhead.graph.run_counts import Run, Tally


def test_counts_lose_nothing_to_threads() -> None:
    tally = Tally()

    def count() -> None:
        for _ in range(5000):
            tally.add()
            assert tally.value >= 0

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert tally.value == 20_000
    assert tally.value == 20_000


def test_runs_of_one_head_are_added_up() -> None:
    runs = [Run(), Run()]
    for run in runs:
        run.answered.add()
        run.built.add("a use")
    both = Run.of(runs)
    assert (both.answered.value, both.built.total) == (2, 2)
    both.answered.add()
    assert (both.answered.value, runs[0].answered.value) == (3, 1)


def test_a_copy_and_what_is_pickled_begin_with_the_count_of_that_moment() -> None:
    tally = Tally()
    tally.add()
    tally.add()
    for other in (copy.copy(tally), copy.deepcopy(tally), pickle.loads(pickle.dumps(tally))):
        assert other.value == 2
        other.add()
        assert (other.value, tally.value) == (3, 2)
