"""Tensor-parallel heads on two ranks: equal to one process, fused, in so many collectives, or left with a sentence."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from tests.functional.ranks import on_ranks
from tests.parallel.arrangements import ARRANGEMENTS, reference

LEFT = {  # what is not fused, and how the sentence begins
    "by hand, Shard(1)": "its weight [96, 16] is placed as Shard(1) on the 2 ranks of mesh dimension 'tp': each rank",
}


@cache
def results() -> list[Any]:
    return on_ranks("tests.parallel.arrangements:every_arrangement", 2, timeout=300)  # they compile


def of(name: str) -> list[dict[str, Any]]:
    found = [result[name] for result in results()]
    for each in found:
        assert isinstance(each, dict), each
    return found


@pytest.mark.parametrize("name", ARRANGEMENTS)
def test_it_gives_the_numbers_of_one_process(name: str) -> None:
    _, kind, how = ARRANGEMENTS[name]
    eager, exact = (reference(kind, dtype, **how) for dtype in (torch.float32, torch.float64))
    for ours in of(name):
        pairs = [(ours["losses"], eager["losses"], exact["losses"])]
        for part in ("gradients", "parameters"):
            assert ours[part].keys() == eager[part].keys()
            pairs += [(ours[part][k], eager[part][k], exact[part][k]) for k in exact[part]]
        for got, plain, truth in pairs:
            least = 4 * torch.finfo(torch.float32).eps * truth.abs().max()
            assert (got - truth).abs().max() <= max(1.5 * (plain - truth).abs().max(), least)


@pytest.mark.parametrize("name", ARRANGEMENTS)
def test_it_is_fused_or_left_with_a_sentence_about_the_shard(name: str) -> None:
    for ours in of(name):
        (head,) = ours["heads"]
        fused, reason, vocab, tokens = head
        assert fused == (name not in LEFT), reason
        assert (vocab, tokens) == (ARRANGEMENTS[name][2].get("vocab", 96), 24)
        assert reason.startswith(LEFT.get(name, ""))


def test_a_head_takes_two_collectives_forward_and_one_backward() -> None:
    quiet = {"by hand, Replicate", "FSDP2 x TP, (2, 1)", *LEFT}
    for name in ARRANGEMENTS.keys() - quiet - {"sequence parallel"}:
        for ours in of(name):
            assert (name, ours["forward"], ours["backward"]) == (name, {"allreduce_": 2}, {"allreduce_": 1})
    for ours in of("by hand, Replicate"):
        assert not ours["forward"]
        assert not ours["backward"]
    for ours in of("FSDP2 x TP, (2, 1)"):  # FSDP's own: every rank has all classes
        assert (ours["forward"], ours["backward"]) == ({"_allgather_base_": 1}, {"_reduce_scatter_base_": 1})


def test_under_sequence_parallelism_the_gradient_of_the_hidden_states_is_reduce_scattered() -> None:
    for ours in of("sequence parallel"):
        # the embedding's own scatter forward and gather backward, and those of the hidden states
        assert ours["forward"].pop("allreduce_") == 2
        assert ours["forward"].pop("_allgather_base_") == 1
        assert ours["backward"].pop("_reduce_scatter_base_") == 1
        assert "allreduce_" not in ours["backward"]
