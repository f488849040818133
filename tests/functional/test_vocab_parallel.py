"""A head whose vocabulary is split over processes: equal to one process, in so many collectives, or an error on all."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

import fusedhead
from tests.functional.ranks import on_ranks
from tests.functional.shards import SPLITS
from tests.functional.test_linear_cross_entropy import FORMS, given, outcome, plainly

N, D, V = 24, 16, 96
RANKS = (2, 4)


@cache
def every_form(ranks: int) -> list[Any]:
    return on_ranks("tests.functional.shards:every_form", ranks)


def joined(results: list[list[Any]]) -> list[torch.Tensor]:
    """Loss and gradients of the whole head from those of the ranks, which must agree on what they share."""
    first = results[0]
    for other in results[1:]:
        assert torch.equal(other[0], first[0])
        assert torch.equal(other[1], first[1])
    return [first[0], first[1], *(torch.cat([r[at] for r in results]) for at in (2, 3))]


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("form", range(len(FORMS)), ids=lambda i: ",".join(FORMS[i]) or "plain")
def test_shards_give_the_numbers_of_one_process(ranks: int, split: str, form: int) -> None:
    operands = given(3, bias=True)
    if "ignore_index" in FORMS[form]:
        operands["target"] = operands["target"].clamp(min=0)
    ours = joined([result[f"{split}/{form}"] for result in every_form(ranks)])
    truth = outcome(plainly, operands, torch.float64, **FORMS[form])
    eager = outcome(plainly, operands, torch.float32, **FORMS[form])
    for got, plain, exact in zip(ours, eager, truth, strict=True):
        least = 4 * torch.finfo(torch.float32).eps * root_mean_square(exact)
        assert root_mean_square(got - exact) <= max(1.5 * root_mean_square(plain - exact), least)


def root_mean_square(error: torch.Tensor) -> torch.Tensor:
    """Unlike a maximum it does not hang on the luck of one entry."""
    return error.square().mean().sqrt()


@pytest.mark.parametrize("ranks", RANKS)
def test_a_head_takes_two_collectives_forward_and_one_backward(ranks: int) -> None:
    for result in every_form(ranks):
        for split in ("uneven", "an empty shard"):
            forward, backward = result[f"{split}/0"][4:6]
            # how many classes each rank has, and a mark; then lse in two numbers and the label's logit, with 3 more
            assert forward == [("all_gather", 16), ("all_gather", 4 * (3 * N + 3))]
            assert backward == [("all_reduce", 4 * N * D)]
            forward, _ = result[f"{split}/3"][4:6]
            assert forward[1:] == [("all_gather", 4 * (5 * N + 3))]  # label smoothing


@pytest.mark.parametrize("ranks", RANKS)
def test_even_shards_gather_a_window_before_its_products_and_sum_once(ranks: int) -> None:
    for result in every_form(ranks):
        forward, backward = result["even/0"][4:6]
        window, dh = ("all_gather", 4 * (3 * N + 3)), ("all_reduce", 4 * N * D)
        assert forward == [("all_gather", 16), window, dh]
        assert backward == []
        forward, _ = result["even/3"][4:6]  # label smoothing with a bias: two sweeps
        assert forward == [("all_gather", 16), ("all_gather", 4 * (5 * N + 3)), dh]


def test_a_rank_that_vocab_size_leaves_without_classes_takes_part() -> None:
    operands = given(3)
    h, w = (
        operands[name].detach()[: (None, 9)[at]].requires_grad_() for at, name in enumerate(("input", "linear_weight"))
    )
    loss = torch.nn.functional.cross_entropy(h @ w.t(), operands["target"] % 9)
    loss.backward()
    results = on_ranks("tests.functional.shards:few_classes", 4)
    for got, dh, _ in results:
        torch.testing.assert_close(got, loss.detach())
        torch.testing.assert_close(dh, h.grad)
    assert [len(dw) for _, _, dw in results] == [3, 3, 3, 0]
    torch.testing.assert_close(torch.cat([dw for _, _, dw in results]), w.grad)


def test_it_is_deterministic() -> None:
    for result in every_form(2):
        for a, b in zip(result["even/0"][:4], result["twice"][:4]):
            assert torch.equal(a, b)


def test_gradients_of_two_bytes_are_summed_in_float32() -> None:
    operands = given(3, bias=True)
    exact = outcome(plainly, operands, torch.float64)
    narrow = outcome(plainly, operands, torch.bfloat16)
    ours = joined([result["bfloat16"] for result in every_form(4)])
    assert every_form(4)[0]["bfloat16"][4][-1:] == [("all_reduce", 4 * N * D)]
    for got, plain, truth in zip(ours[1:], narrow[1:], exact[1:]):
        assert (got - truth).abs().max() <= 1.5 * (plain - truth).abs().max()


def test_compiled_the_collectives_are_in_the_graph() -> None:
    operands = given(3)
    loss = plainly(**operands)
    loss.backward()
    results = on_ranks("tests.functional.shards:compiled", 2)
    for got, h, _, _ in results:
        torch.testing.assert_close(got, loss.detach())
        torch.testing.assert_close(h, operands["input"].grad)
    torch.testing.assert_close(torch.cat([r[2] for r in results]), operands["linear_weight"].grad)


def test_ranks_that_do_not_fit_together_all_raise() -> None:
    first, second = on_ranks("tests.functional.shards:mistakes", 2)
    for name in ("reduction", "smoothing", "memory", "gradients"):
        assert first[name].startswith("ShardMismatch: the ranks of the group do not hold shards of one head")
        assert first[name] == second[name]
    sentences = {"hidden size": "input must be [..., D]", "vocab_size": "rank 1 of 2 must hold 48 of the 96"}
    for name, sentence in sentences.items():
        assert first[name].startswith("ShardMismatch")
        assert second[name].startswith("ValueError: " + sentence)
    for rank, actual in enumerate((first, second)):
        expected = f"ValueError: rank {rank} of 2 must hold 96 of the 192 rows that vocab_size names. Got: 48"
        assert actual["a group of half as many ranks"].startswith(expected)
        assert actual["label"].startswith("LabelOutOfRange: label ")
    assert issubclass(fusedhead.LabelOutOfRange, IndexError)
