"""Vocabulary-parallel losses that people write by hand, and transformers' own plan: right, and fused or explained."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.functional.ranks import on_ranks
from tests.parallel.arrangements import program, reference
from tests.parallel.hand_written import FORMS, VOCAB
from tests.parallel.models import Setting

LEFT = {"megatron": "an autograd.Function with a backward of its own takes the logits; a loss of logits in shards"}


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    return on_ranks("tests.parallel.hand_written:outcomes", 2, timeout=900)


def close(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    torch.testing.assert_close(ours["losses"], theirs["losses"])
    for part in ("gradients", "parameters"):
        for name, exact in theirs[part].items():
            torch.testing.assert_close(ours[part][name], exact, rtol=1e-5, atol=float(2e-6 * exact.abs().max()))


@pytest.mark.parametrize("name", FORMS)
def test_a_form_gives_the_numbers_of_one_process_and_is_fused_or_explained(
    name: str, results: list[dict[str, Any]]
) -> None:
    first, second = (result[name] for result in results)
    for part in ("gradients", "parameters"):
        assert not torch.equal(first[part]["head.weight"], second[part]["head.weight"])
        first[part]["head.weight"] = torch.cat([each[part]["head.weight"] for each in (first, second)])
    close(first, reference(Setting(), program(VOCAB), torch.float32))
    ((fused, reason, vocab, tokens),) = first["heads"]
    assert (vocab, tokens) == (VOCAB // 2, Setting().batch * Setting().time)
    assert fused == (name not in LEFT)
    assert reason.startswith(LEFT.get(name, ""))


def test_the_plan_of_transformers_is_fused(results: list[dict[str, Any]]) -> None:
    pytest.importorskip("transformers")
    for result in results:
        ours = result["transformers"]
        assert isinstance(ours, dict), ours
        close(ours, ours["one process"])
        (head,) = [head for head in ours["heads"] if head[2] == 96]
        assert head[0], head
