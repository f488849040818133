"""Tensor-parallel heads on ranks: equal to one process, fused, in so many collectives, or left with a sentence."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from tests.functional.ranks import on_ranks
from tests.parallel.arrangements import ARRANGEMENTS, BF16, IN_TWO_BYTES, THROUGH_INDUCTOR
from tests.parallel.compared import check, errors_of_rounding
from tests.parallel.models import Setting


@cache
def launched(function: str, ranks: int) -> list[Any] | str:
    """What the ranks return, or what they said when they failed, once."""
    try:
        return on_ranks(f"tests.parallel.arrangements:{function}", ranks, timeout=900)  # they compile
    except AssertionError as error:
        return str(error)


def results(function: str, ranks: int) -> list[Any]:
    result = launched(function, ranks)
    assert isinstance(result, list), result
    return result


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", ARRANGEMENTS)
def test_it_gives_the_numbers_of_one_process_in_so_many_collectives_or_is_left(name: str, ranks: int) -> None:
    for ours in results("every_arrangement", ranks):
        check(name, Setting(), ours[name])


@pytest.mark.parametrize("name", THROUGH_INDUCTOR)
def test_the_same_through_inductor(name: str) -> None:
    for ours in results("through_inductor", 2):
        check(name, Setting(inductor=True), ours[name])


@pytest.mark.parametrize("name", IN_TWO_BYTES)
def test_in_two_bytes_it_errs_as_one_process_does(name: str) -> None:
    for ours in results("in_two_bytes", 2):
        assert all(fused for each in ours[name] for fused, *_ in each["heads"])
        for what, error, allowed in errors_of_rounding(name, BF16, ours[name]):
            assert error <= allowed, (what, error, allowed)


def test_it_is_deterministic_and_equal_on_all_ranks() -> None:
    first, *others = results("every_arrangement", 2)
    again = on_ranks("tests.parallel.arrangements:sample", 2, timeout=300)[0]
    for name in again:
        for other in [*(o[name] for o in others), again[name]]:
            assert (first[name]["losses"] == other["losses"]).all()
            for part in ("gradients", "parameters"):
                assert all((x == other[part][k]).all() for k, x in first[name][part].items())
