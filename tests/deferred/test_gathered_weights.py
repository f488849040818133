"""Weights that FSDP frees while logits are made of them: the numbers of eager code, in no more memory."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from fusedhead.deferred import gathered_weights
from fusedhead.legality.reasons import Illegal
from tests.distributed.arrangements import D, V
from tests.distributed.gathered_weights import FSDP1, PROGRAMS
from tests.functional.ranks import on_ranks

WEIGHT = 4 * V * D  # bytes
MODULE = "tests.distributed.gathered_weights"


@cache
def results(function: str) -> list[dict[str, Any]]:
    return on_ranks(f"{MODULE}:{function}", 2)


@pytest.mark.parametrize("root", ["kept", "resharded"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_that_frees_a_weight_sees_what_eager_code_shows(name: str, root: str) -> None:
    for rank in results("every_program"):
        result = rank[f"{name}, {root}"]
        for ours, eager in zip(result["ours"], result["eager"], strict=True):
            torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-6)


def test_a_weight_is_copied_where_it_is_freed_before_it_is_read_and_nowhere_else() -> None:
    for rank in results("every_program"):
        assert rank["two_forwards, kept"]["copied"] == []
        assert rank["resharded_between, kept"]["copied"] == []
        assert rank["read_numbers_then_freed, kept"]["copied"] == []
        assert rank["saved_between, kept"]["copied"] == [WEIGHT]
        assert rank["read_in_the_next_step, kept"]["copied"] == [WEIGHT]
        assert rank["evaluated_and_collected, kept"]["copied"] == [WEIGHT]  # one for both batches
        assert rank["two_forwards, resharded"]["copied"] == [WEIGHT, WEIGHT]


def test_weights_are_copied_at_once_where_torch_frees_them_unseen(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for rank in results("unseen"):
        for result in rank.values():
            assert result["copied"] == []
            for ours, eager in zip(result["ours"], result["eager"], strict=True):
                torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-6)
    for missing in (
        ("torch.nowhere", "FSDPParam", "free"),
        ("torch.nn", "Linear", "free"),
        ("torch.nn", "Linear", "forward"),
    ):
        monkeypatch.setattr(gathered_weights, "FREES", missing)
        assert not gathered_weights.wrap_free()
    assert "weights under FSDP2 are copied, since this torch has no torch.nowhere.FSDPParam.free" in caplog.text


@pytest.mark.parametrize("logits", ["dropped", "held"])
@pytest.mark.parametrize("root", ["kept", "resharded"])
def test_logits_that_nobody_reads_take_no_more_memory_than_without_us(root: str, logits: str) -> None:
    for rank in results("memory"):
        ours, plain, copied = rank[f"{root}, {logits}"]
        assert ours <= plain
        if root == "kept" and logits == "dropped":
            assert copied == []


@pytest.mark.parametrize("name", FSDP1)
def test_a_head_under_fsdp1_is_fused_with_its_loss_or_left_with_the_reason(name: str) -> None:
    for rank in results("every_fsdp1"):
        result = rank[name]
        for ours, plain in zip(*result["losses"], strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)
        (head,) = result["heads"]
        within, flat = FSDP1[name][0] == "both", "flat" in name
        why = Illegal.FLAT_WEIGHT if flat else Illegal.GATHERED_WEIGHT
        assert (head["fused"], head["reason"]) == (within and not flat, "" if within and not flat else why.template)


@pytest.mark.parametrize("name", ["fsdp", "fsdp, resharded", "ddp", "ddp, static_graph"])
def test_a_model_that_multiplies_by_its_embedding_is_fused_on_ranks(name: str) -> None:
    for rank in results("tied_products"):
        result = rank[name]
        for ours, plain in zip(*result["losses"], strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)
        assert result["answered"] == [result["steps"]]
