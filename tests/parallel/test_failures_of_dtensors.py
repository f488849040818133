"""A rank that dies, or whose shard does not fit: an error on every rank within the process group's timeout."""

from __future__ import annotations

import pytest

from tests.functional.ranks import on_ranks

TIMEOUT = 200  # of all; a collective's is a fifth


@pytest.mark.parametrize("when", ["in_the_forward", "in_the_backward", "before_it_compiles"])
def test_a_rank_that_dies_is_an_error_on_the_other(when: str) -> None:
    left, dead = on_ranks(f"tests.parallel.failures:{when}", 2, TIMEOUT, may_die=True)
    assert dead is None
    said, seconds, fused = left
    assert said != "no error"
    assert seconds <= TIMEOUT / 5 + 5
    assert fused == [when != "before_it_compiles"]


def test_shards_that_do_not_fit_together_are_an_error_on_every_rank() -> None:
    for found in on_ranks("tests.parallel.failures:misfits", 2, TIMEOUT, may_die=True):
        for said, seconds in found.values():
            assert said != "no error"
            assert seconds <= 25
        assert found["a group of half as many ranks"][0].startswith("LabelOutOfRange: label 4")
