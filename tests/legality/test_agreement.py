"""Ranks that agree on what they fuse, here threads with one store: all say the same, and none waits for ever."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch.distributed as dist

from fusedhead.legality import agreement

Rank = Callable[[Callable[[str, bool], bool]], Any]


STORES = {
    "HashStore": dist.HashStore,
    "TCPStore": lambda: dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False),  # torchrun's
}


@pytest.fixture(params=STORES)
def ranks(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Callable[..., list[Any]]:
    """Runs functions as the ranks of a group; each is given `agreement.agreed` of its rank."""
    store, at = dist.PrefixStore("fusedhead/tp", STORES[request.param]()), threading.local()
    monkeypatch.setattr(agreement, "minds", {})
    monkeypatch.setattr(agreement, "store_of", lambda group: store)
    monkeypatch.setattr(agreement, "group_of", lambda group: group)
    monkeypatch.setattr(agreement.dist, "get_backend", lambda group: "gloo")
    monkeypatch.setattr(agreement.dist, "get_rank", lambda group: at.rank)
    monkeypatch.setattr(agreement.dist, "get_world_size", lambda group: at.ranks)

    def run(*functions: Rank) -> list[Any]:
        results: list[Any] = [None] * len(functions)

        def one(rank: int) -> None:
            at.rank, at.ranks = rank, len(functions)
            results[rank] = functions[rank](lambda heads, wanted: agreement.agreed(f"of {rank}", heads, wanted))

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(len(functions))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
            assert not thread.is_alive()
        return results

    return run


def asks(heads: str, wanted: bool = True, after: float = 0.0) -> Rank:
    def rank(agreed: Callable[[str, bool], bool]) -> bool:
        time.sleep(after)
        return agreed(heads, wanted)

    return rank


def test_what_all_have_compiled_is_fused(ranks: Any) -> None:
    assert ranks(asks("a"), asks("a", after=0.2), asks("a")) == [True] * 3


def test_one_that_does_not_want_it_speaks_for_all(ranks: Any) -> None:
    assert ranks(asks("a"), asks("a", wanted=False, after=0.1), asks("a")) == [False] * 3


def test_ranks_that_wait_for_different_heads_do_not_wait_long(ranks: Any) -> None:
    started = time.monotonic()
    assert ranks(asks("a"), asks("b"), asks("a")) == [False] * 3
    assert time.monotonic() - started < 30


def test_a_rank_that_does_not_come_is_waited_for_and_finds_what_was_said(
    ranks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agreement, "WAIT", 0.3)
    assert ranks(asks("a"), asks("a", after=1.0)) == [False] * 2


def test_a_head_that_is_compiled_again_finds_what_was_said(ranks: Any) -> None:
    def twice(agreed: Callable[[str, bool], bool]) -> list[bool]:
        return [agreed("a", True), agreed("a", True)]

    assert ranks(twice, asks("a")) == [[True, True], True]


def test_all_may_change_their_minds(ranks: Any) -> None:
    def off_and_on(agreed: Callable[[str, bool], bool]) -> list[bool]:
        return [agreed("a", wanted) for wanted in (False, True, True, False, True)]

    assert ranks(off_and_on, off_and_on) == [[False, True, True, False, True]] * 2


def test_heads_one_after_another_are_no_different_heads(ranks: Any) -> None:
    def many(agreed: Callable[[str, bool], bool]) -> list[bool]:
        return [agreed(str(i), True) for i in range(20)]

    assert ranks(many, many, many) == [[True] * 20] * 3
