"""Heads of DTensors on two processes: a sample of the arrangements that `tests/parallel` goes through."""

from __future__ import annotations

from typing import Any

import pytest

from tests.functional.ranks import on_ranks
from tests.parallel.arrangements import SAMPLE
from tests.parallel.compared import check
from tests.parallel.models import Setting


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    return on_ranks("tests.parallel.arrangements:sample", 2, timeout=600)  # they compile


@pytest.mark.parametrize("name", SAMPLE)
def test_it_gives_the_numbers_of_one_process_in_so_many_collectives(name: str, results: list[dict[str, Any]]) -> None:
    for ours in results:
        check(name, Setting(), ours[name])
