"""Heads under DDP and FSDP2 on two processes: the numbers of one process, fused, and told as what happened."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from fusedhead.deferred.reasons import BuiltAtOnce
from tests.distributed.arrangements import ARRANGEMENTS, STEPS
from tests.functional.ranks import on_ranks

RANKS = 2


@cache
def results(ranks: int) -> list[dict[str, Any]]:
    return on_ranks("tests.distributed.arrangements:every_arrangement", ranks)


@pytest.mark.parametrize("name", ARRANGEMENTS)
def test_an_arrangement_has_the_numbers_of_one_process(name: str) -> None:
    for rank in results(ARRANGEMENTS[name].ranks):
        result = rank[name]
        if ARRANGEMENTS[name].narrow:  # what one number is off by is a matter of luck
            whole = {key: torch.cat([x.double().flatten() for x in result[key]]) for key in ("ours", "plain", "exact")}
            assert (whole["ours"] - whole["exact"]).norm() <= 1.1 * (whole["plain"] - whole["exact"]).norm()
            continue
        for got, plain, exact in zip(result["ours"], result["plain"], result["exact"], strict=True):
            least = 4 * torch.finfo(torch.float32).eps * exact.abs().max()
            assert (got - exact).abs().max() <= torch.maximum(1.5 * (plain - exact).abs().max(), least)


@pytest.mark.parametrize("name", ARRANGEMENTS)
def test_its_logits_are_built_only_where_numbers_are_asked_for(name: str) -> None:
    how = ARRANGEMENTS[name]
    for rank in results(ARRANGEMENTS[name].ranks):
        (head,) = rank[name]["heads"]
        assert (head["fused"], head["logits"], head["built"], head["at once"]) == (True, "deferred", how.built, 0)
        assert head["deferred"] >= STEPS * how.micro
        if how.returns == "logits" and not how.built:
            assert head["answered"] >= STEPS * how.micro


def test_a_gathered_weight_that_is_an_argument_is_read_after_it_is_resharded() -> None:
    for ours, eager in on_ranks("tests.distributed.arrangements:weight_as_an_argument", RANKS):
        torch.testing.assert_close(ours, eager)


def test_logits_smaller_than_their_weight_are_computed_at_once_and_the_report_says_so() -> None:
    for (text,) in on_ranks("tests.distributed.arrangements:few_tokens", RANKS):
        assert f"built at once once: {BuiltAtOnce.LARGE_COPY.template}" in text
