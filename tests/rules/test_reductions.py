"""Moments of log p under p: the variance that Min-K%++ divides by, in its spellings, out of one sweep."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.programs.claims import D, hidden, labels, right, weight


def by_powers(z: Tensor) -> Tensor:
    p, logp = F.softmax(z, -1), F.log_softmax(z, -1)
    return (p * logp**2).sum(-1) - (p * logp).sum(-1) ** 2


def by_square(z: Tensor) -> Tensor:
    """As Min-K%++ is published."""
    p, logp = F.softmax(z, -1), F.log_softmax(z, -1)
    mu = (p * logp).sum(-1)
    return (p * torch.square(logp)).sum(-1) - torch.square(mu)


def by_products(z: Tensor) -> Tensor:
    logp = F.log_softmax(z, -1)
    plogp = logp.exp() * logp
    return (plogp * logp).sum(-1) - plogp.sum(-1).square()


def product_of_logs_first(z: Tensor) -> Tensor:
    logp = z.log_softmax(-1)
    return ((logp * logp) * logp.exp()).sum(-1) - (logp * logp.exp()).sum(-1).pow(2)


FORMS = (by_powers, by_square, by_products, product_of_logs_first)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_the_variance_and_its_gradients_are_eager_codes(form: Callable[[Tensor], Tensor]) -> None:
    def program(h: Tensor, w: Tensor) -> Tensor:
        return form(F.linear(h, w)).mean()

    report = right(program, hidden(6, D), weight())
    assert report.after.count("torch.ops.fusedhead.head_stats") == 1
    assert "variance" in report.after


def test_a_score_of_min_k_takes_one_sweep() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        z = F.linear(h, w)
        logp = F.log_softmax(z, -1)
        mu = (F.softmax(z, -1) * logp).sum(-1)
        score = (logp.gather(-1, y[:, None])[:, 0] - mu) / by_square(z).sqrt()
        return score.sort().values[:3].mean()

    report = right(program, hidden(6, D), weight(), labels(6))
    assert report.after.count("torch.ops.fusedhead.head_") == 1


def test_squares_that_no_probability_weighs_are_computed_token_by_token() -> None:
    def program(h: Tensor, w: Tensor) -> Tensor:
        return (F.linear(h, w).log_softmax(-1) ** 2).sum(-1).mean()

    report = right(program, hidden(6, D), weight())
    assert "head_rows" in report.after


def test_a_third_moment_is_computed_token_by_token() -> None:
    def program(h: Tensor, w: Tensor) -> Tensor:
        logp = F.linear(h, w).log_softmax(-1)
        return (logp.exp() * logp**2 * logp).sum(-1).mean()

    report = right(program, hidden(6, D), weight())
    assert "variance" not in report.after


def test_squares_of_other_logits_are_no_variance() -> None:
    def program(h: Tensor, w: Tensor) -> Tensor:
        z = F.linear(h, w)
        logp = z.log_softmax(-1)
        return (logp.exp() * logp * (2 * z).log_softmax(-1)).sum(-1).mean()

    report = right(program, hidden(6, D), weight())
    assert "variance" not in report.after
