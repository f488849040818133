"""Ranks that do not do the same: what torch computes, or an error on every rank. None waits for ever."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.functional.ranks import on_ranks

FUSED = {"labels of its own", "labels and a scale of its own"}
LEFT = {
    "rows of its own": "not every rank of its process group",
    "a number of its own": "meets logits that the program gathered",
    "a loss on one rank": "",
    "another option": "",
    "another budget": "not every rank of its process group",
}


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    return on_ranks("tests.parallel.differing:outcomes", 2, timeout=600)


@pytest.mark.parametrize("name", [*FUSED, *LEFT])
def test_each_rank_has_what_torch_computes(name: str, results: list[dict[str, Any]]) -> None:
    for result in results:
        ours, theirs = result[name]
        torch.testing.assert_close(ours["losses"], theirs["losses"])
        for part in ("gradients", "parameters"):
            for key, x in theirs[part].items():
                torch.testing.assert_close(ours[part][key], x)
        (head,) = ours["heads"] or [(False, LEFT.get(name, ""))]
        assert head[0] == (name in FUSED), head
        assert LEFT.get(name, "") in head[1]


def test_a_rank_that_switches_it_off_switches_it_off_for_all(results: list[dict[str, Any]]) -> None:
    on, off = results
    assert "one has fusedhead.shards off" in on["another option"][0]["heads"][0][1]
    assert off["another option"][0]["heads"][0][1].endswith("fusedhead.shards is off")


def test_switched_off_by_all_it_can_be_switched_on_again(results: list[dict[str, Any]]) -> None:
    for result in results:
        ((fused, reason, *_),) = result["off"]["heads"]
        assert not fused
        assert reason.endswith("fusedhead.shards is off")
        assert result["on again"]["heads"][0][0]


def test_a_label_that_is_no_class_on_one_rank_raises_on_all(results: list[dict[str, Any]]) -> None:
    for result in results:
        assert result["a wrong label"].startswith("label 1")
        assert "must lie in [0, 95]" in result["a wrong label"]
