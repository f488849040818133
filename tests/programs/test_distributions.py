"""`torch.distributions.Categorical` over a vocabulary, as policy gradients write it: fused, with eager's numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Categorical

from tests.programs.claims import D, compiled, hidden, labels, right, weight


@pytest.mark.parametrize("shape", [(6,), (2, 5)])
def test_the_log_probability_of_an_action_is_gathered(shape: tuple[int, ...]) -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return -Categorical(logits=F.linear(h, w)).log_prob(y).mean()

    report = right(program, hidden(*shape, D), weight(), labels(*shape))
    assert "gather" in str(report)


def test_an_entropy_bonus_beside_it_shares_the_sweep() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor, advantage: Tensor) -> Tensor:
        policy = Categorical(logits=F.linear(h, w))
        return -(policy.log_prob(y) * advantage).mean() - 0.01 * policy.entropy().mean()

    right(program, hidden(6, D), weight(), labels(6), torch.randn(6))


def calls_of(report: Any) -> int:
    return report.after.count("torch.ops.fusedhead.head_")


FORMS = {
    "log_softmax by hand": lambda z, y: (z - z.logsumexp(-1, keepdim=True)).gather(-1, y[:, None]).mean(),
    "labels made after the sweep": lambda z, y: (z.logsumexp(-1) - z.gather(-1, (y + 0)[:, None])[:, 0]).mean(),
    "in log space": lambda z, y: (z.logsumexp(-1) * 0.5 + (z - 1.5).gather(-1, y[:, None])[:, 0]).sum(),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_terms_of_a_whole_row_and_late_labels_take_no_sweep_of_their_own(form: Callable[..., Tensor]) -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return form(F.linear(h, w), y)

    report = right(program, hidden(6, D), weight(), labels(6))
    assert calls_of(report) == (2 if form is FORMS["in log space"] else 1)


def test_a_learned_term_of_each_row_gets_its_gradient() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor, t: Tensor) -> Tensor:
        z = F.linear(h, w)
        entry = (z + t[:, None]).gather(-1, y[:, None])[:, 0]
        return ((entry - z.logsumexp(-1)) * t).sum()

    right(program, hidden(6, D), weight(), labels(6), torch.randn(6, requires_grad=True))


def test_rows_picked_after_the_term_was_added_are_right() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        z = F.linear(h, w)
        return (z - z.logsumexp(-1, keepdim=True))[1:].gather(-1, y[1:, None]).mean()

    right(program, hidden(6, D), weight(), labels(6))


def test_a_term_or_labels_that_are_written_to_in_between_give_eagers_numbers() -> None:
    def term(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        z = F.linear(h, w)
        lse = z.logsumexp(-1, keepdim=True).detach()
        log_probs = z - lse
        lse.mul_(2)
        return log_probs.gather(-1, y[:, None]).mean()

    def late(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        z, y = F.linear(h, w), y.clone()
        lse = z.logsumexp(-1)
        y[0] = 0
        return (lse - z.gather(-1, y[:, None])[:, 0]).mean()

    for program in (term, late):
        compiled(program, (hidden(6, D), weight(), labels(6)))
