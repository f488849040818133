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


def test_a_mesh_of_half_as_many_ranks_is_an_error_on_every_rank() -> None:
    for result in on_ranks("tests.parallel.failures:smaller_group", 2, TIMEOUT, may_die=True):
        said, seconds = result["a group of half as many ranks"]
        assert "out of range" in said or "out of bounds" in said
        assert seconds <= 25


def test_ranks_of_other_hidden_sizes_read_an_error_or_are_ended_by_gloo() -> None:
    """The head is left, and gloo ends a process that it sends more than it awaits: no number comes out, none hangs."""
    for result in on_ranks("tests.parallel.failures:other_hidden_size", 2, TIMEOUT, may_die=True):
        said, seconds = ("ended", 0.0) if result is None else result["hidden size"]
        assert said != "no error"
        assert seconds <= 25
