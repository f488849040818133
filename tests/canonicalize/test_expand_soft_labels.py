"""Targets that a program builds out of labels are statistics, with eager code's values and gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.eager_stack import Rewritten
from tests.programs.mixed_model import YK, D, Model, N, V, Y, right

TARGETS: dict[str, Callable[[Tensor], Tensor]] = {
    "zeros_like and scatter": lambda z: torch.zeros_like(z).scatter(1, Y[:, None], 1),
    "full_like and scatter_": lambda z: torch.full_like(z, 0.1 / (V - 1)).scatter_(1, Y.unsqueeze(1), 0.9),
    "zeros and scatter_": lambda z: torch.zeros(N, V).scatter_(1, Y[:, None], 1.0) * 0.9 + 0.1 / V,
    "one_hot": lambda z: F.one_hot(Y, V) * 0.9 + 0.1 / V,
    "one_hot, float": lambda z: F.one_hot(Y, V).float(),
}


# zero elsewhere, where an infinite log-probability makes NaN, which a sum does not tell: computed token by token
LABEL_ALONE = ("zeros_like and scatter", "one_hot, float")


@pytest.mark.parametrize("target", TARGETS)
def test_smoothed_labels_that_are_built(target: str) -> None:
    def loss(m: Model, h: Tensor) -> Tensor:
        z = F.linear(h, m.w)
        with torch.no_grad():
            wanted = TARGETS[target](z)
        return -(wanted * z.log_softmax(-1)).sum(-1).mean()

    (head,) = right(loss).report.heads
    assert head.fused
    assert ("gather" in head.computes) == (target not in LABEL_ALONE)  # statistics, no token program


def read_twice(z: Tensor) -> Tensor:
    t = torch.zeros_like(z).scatter(1, Y[:, None], 0.9)
    return -(t * z.log_softmax(-1)).sum(-1).mean() + t.square().mean()


def changed_afterwards(z: Tensor) -> Tensor:
    t = torch.full_like(z, 0.1, requires_grad=False)
    loss = -(t.scatter(1, Y[:, None], 0.9) * z.log_softmax(-1)).sum(-1).mean()
    t.mul_(2)
    return loss + t.mean()


def changed_in_between(z: Tensor) -> Tensor:
    t = torch.zeros_like(z).scatter_(1, Y[:, None], 0.9)
    t[:, 5] = 0.25
    return -(t * z.log_softmax(-1)).sum(-1).mean()


def two_labels(z: Tensor) -> Tensor:
    t = torch.zeros_like(z).scatter_(1, YK, 0.3)
    return -(t * z.log_softmax(-1)).sum(-1).mean()


def summed_over_everything(z: Tensor) -> Tensor:
    t = torch.full_like(z, 0.1 / V)
    t.scatter_(-1, Y[:, None], 0.9)
    return (-z.log_softmax(-1) * t).sum() / N


def kept_dimension(z: Tensor) -> Tensor:
    t = 1 - F.one_hot(Y, V).float()
    return (-(t * z.log_softmax(-1))).sum(dim=-1, keepdim=True).mean()


def of_the_logits(z: Tensor) -> Tensor:
    return z.logsumexp(-1).mean() - (F.one_hot(Y, num_classes=V) * z).sum(1).mean()


@pytest.mark.parametrize(
    "loss", [read_twice, changed_afterwards, changed_in_between, two_labels, summed_over_everything, kept_dimension,
             of_the_logits]
)  # fmt: skip
def test_targets_that_are_built_in_other_ways_are_right(loss: Callable[[Tensor], Tensor]) -> None:
    right(lambda m, h: loss(F.linear(h, m.w)))


def test_a_label_smoothed_head_with_a_forbidden_class_is_not_finite_where_eager_code_is_not() -> None:
    def loss(m: Model, h: Tensor) -> Tensor:
        z = F.linear(h, m.w).masked_fill(torch.arange(V) == V - 1, -float("inf"))
        return -(torch.zeros_like(z).scatter(1, Y[:, None], 1) * z.log_softmax(-1)).sum(-1).mean()

    model, x = Model(loss), torch.randn(N, D)
    assert Rewritten(model)(x).isnan()
    assert model(x).isnan()


def test_smoothed_labels_filled_and_scattered_in_place() -> None:
    def loss(m: Model, h: Tensor) -> Tensor:
        z = F.linear(h, m.w)
        with torch.no_grad():
            wanted = z.data.clone()
            wanted.fill_(0.1 / (V - 2))
            wanted.scatter_(1, Y[:, None], 0.9)
            wanted[:, 0] = 0
        return F.kl_div(z.log_softmax(-1), wanted, reduction="sum")

    assert [head.fused for head in right(loss).report.heads] == [True]
