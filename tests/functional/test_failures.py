"""A rank that dies in the middle of a head in shards: an error on the others within the process group's timeout."""

from __future__ import annotations

import pytest

from tests.functional.ranks import on_ranks

TIMEOUT = 150  # of all; a collective's is a fifth


@pytest.mark.parametrize("when", ["in_the_forward", "in_one_sweep", "in_the_backward"])
def test_a_rank_that_dies_is_an_error_on_the_other(when: str) -> None:
    left, dead = on_ranks(f"tests.functional.failures:{when}", 2, TIMEOUT, may_die=True)
    assert dead is None
    said, seconds = left
    assert said != "no error"
    assert seconds <= TIMEOUT / 5 + 5
