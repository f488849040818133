"""Token regions: which ops around the logits become one token program, and which keep the head as it is."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.programs.claims import D, V, hidden, labels, left, right, weight
from tests.rewrite.divergences import calls, distillation, top_k_accuracy


def test_what_is_detached_wants_no_gradient() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        z = F.linear(h, w)
        return F.cross_entropy(z, y), z.sin().detach().logsumexp(1)

    right(program, hidden(6, D), weight(), labels(6))


def test_what_nobody_reads_goes_with_the_logits() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        z = F.linear(h, w)
        torch.log(torch.softmax(z, 1) + 1e-9)
        return F.cross_entropy(z, y)

    right(program, hidden(6, D), weight(), labels(6))


def test_results_of_different_tokens_have_calls_of_their_own() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z = F.linear(h, w)
        first = z[:, 0]
        return F.cross_entropy(z.view(-1, V), y.view(-1)), z.topk(1, 2).indices, (first.sin() * first).sum(1)

    right(program, hidden(), weight(), labels())


def test_few_logits_are_left_to_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEDHEAD_MIN_LOGITS", "auto")
    many = 1 << 17  # 2 x 5 tokens: more logits than a head needs, fewer than a token program does
    inputs = hidden(), weight(many, D), hidden().detach(), weight(many, D).requires_grad_(False)
    left(distillation, *inputs, because="computed token by token, and they are too few for that to pay")


def test_what_mixes_tokens_is_left_alone() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(h, w).cumsum(0), y)

    left(program, hidden(6, D), weight(), labels(6), because="aten.cumsum.default runs over tokens")


def test_probabilities_that_are_returned_are_left_alone() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        z = F.linear(h, w)
        return F.cross_entropy(z, y), z.softmax(-1) ** 2

    left(program, hidden(6, D), weight(), labels(6), because="computed from all logits, is returned")


def distillation_beside_a_loss(h: Tensor, w: Tensor, ht: Tensor, wt: Tensor, y: Tensor) -> Tensor:
    z = F.linear(h, w)
    with torch.no_grad():
        p = F.softmax(F.linear(ht, wt).float() / 2, -1)
    kl = F.kl_div(F.log_softmax(z.float() / 2, -1), p, reduction="batchmean")
    return 0.5 * F.cross_entropy(z.float().view(-1, V), y.view(-1)) + 2.0 * kl


def test_a_cross_entropy_beside_a_row_program_is_part_of_it() -> None:
    inputs = hidden(), weight(), hidden().detach(), weight().detach(), labels()
    assert calls(distillation_beside_a_loss, *inputs, fused=2) == ["head_rows_loss"]
    assert calls(top_k_accuracy, hidden(6, D), weight(), labels(6)) == ["head_rows_loss"]


def test_a_loss_on_other_tokens_than_a_row_program_stays_a_sweep_of_its_own() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        z = F.linear(h, w)
        return F.cross_entropy(z[:, :-1].reshape(-1, V), y[:, 1:].reshape(-1)), z.topk(1).indices

    assert calls(program, hidden(), weight(), labels()) == ["head_loss", "head_rows"]
