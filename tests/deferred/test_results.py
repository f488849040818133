"""Outcomes of reading a call: bytes by the sizes of the leaves, and the sizes for which a reading holds."""

from __future__ import annotations

import torch

from fusedhead.deferred.results import ALWAYS, Guard, Size

LEAVES = (torch.empty(6, 4), torch.empty(0, 8))


def test_bytes_are_counted_by_the_sizes_of_the_leaves() -> None:
    assert Size(((0, 0), (1, 1)), lambda n, v: 2 * n * v).of(LEAVES) == 96


def test_a_guard_holds_for_the_sizes_that_its_test_admits() -> None:
    guard = Guard(((0, 0),), lambda n: n % 3 == 0)
    assert guard.holds(LEAVES)
    assert not guard.holds((torch.empty(7, 4),))
    assert ALWAYS.holds(LEAVES)


def test_a_guard_that_divides_by_a_size_of_zero_does_not_hold() -> None:
    assert not Guard(((0, 0), (1, 0)), lambda n, m: n // m > 0).holds(LEAVES)
