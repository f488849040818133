"""Traps of label smoothing: every library divides by another count of classes, and masks meet it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.programs.claims import D, V, compiled, hidden, labels, right, weight

N = 8


def some_ignored(ignore: int) -> Tensor:
    y = labels(N)
    y[1:4] = ignore
    return y


def test_smoothing_by_pytorch_divides_by_all_classes() -> None:
    right(
        lambda h, w, y: F.cross_entropy(F.linear(h, w), y, label_smoothing=0.1),
        hidden(N, D),
        weight(),
        some_ignored(-100),
    )


def test_smoothing_by_fairseq_divides_by_the_other_classes() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        lp, eps = F.linear(h, w).log_softmax(-1), 0.1 / (V - 1)
        nll, smooth = -lp.gather(1, y.unsqueeze(1)), -lp.sum(-1, keepdim=True)
        pad = y.unsqueeze(1) == 0
        return (0.9 - eps) * nll.masked_fill(pad, 0.0).sum() + eps * smooth.masked_fill(pad, 0.0).sum()

    right(program, hidden(N, D), weight(), labels(N))


def test_smoothing_by_timm_takes_the_mean_of_the_log_probabilities() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        lp = F.log_softmax(F.linear(h, w), dim=-1)
        return (0.9 * -lp.gather(dim=-1, index=y.unsqueeze(1)).squeeze(1) + 0.1 * -lp.mean(dim=-1)).mean()

    right(program, hidden(N, D), weight(), labels(N))


def test_smoothing_by_a_scattered_distribution_agrees() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        lp = F.linear(h, w).log_softmax(-1)
        target = torch.full_like(lp, 0.1 / (V - 2)).scatter(1, y.unsqueeze(1), 0.9)
        target = target.index_fill(1, torch.tensor([0]), 0.0)
        return F.kl_div(lp, target, reduction="sum")

    compiled(program, [hidden(N, D), weight(), labels(N)])


def test_smoothing_over_a_masked_class_is_as_infinite_as_in_eager_code() -> None:
    def program(h: Tensor, w: Tensor, bias: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(h, w) + bias, y, label_smoothing=0.1)

    bias = torch.zeros(V)
    bias[-1] = -torch.inf
    report = right(lambda h, w, b, y: program(h, w, b, y).detach(), hidden(N, D), weight(), bias, labels(N, high=V - 1))
    assert report.heads


def test_smoothing_by_prophetnet_takes_nothing_from_the_label() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        lp = F.linear(h, w).log_softmax(-1)
        return (-0.9 * lp.gather(1, y[:, None]) - 0.1 / (V - 1) * lp.sum(-1, keepdim=True)).sum()

    right(program, hidden(N, D), weight(), labels(N))


def test_smoothing_by_the_annotated_transformer_leaves_out_label_and_padding() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        lp = F.linear(h, w).log_softmax(-1)
        target = torch.full_like(lp, 0.1 / (V - 2)).scatter_(1, y[:, None], 0.9)
        target[:, 0] = 0
        return F.kl_div(lp, target.masked_fill((y == 0)[:, None], 0.0).detach(), reduction="sum")

    right(program, hidden(N, D), weight(), labels(N))


def test_smoothing_by_speechbrain_is_made_without_gradients() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        lp = F.linear(h, w).log_softmax(-1)
        with torch.no_grad():
            target = torch.zeros_like(lp)
            target.fill_(0.1 / (V - 1))
            target.scatter_(1, y[:, None], 0.9)
        return F.kl_div(lp, target, reduction="none").sum(1).mean()

    right(program, hidden(N, D), weight(), labels(N))


def test_smoothing_of_a_one_hot_target_is_right() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        lp = F.linear(h, w).log_softmax(-1)
        one = torch.zeros_like(lp).scatter(1, y[:, None], 1.0)
        return -((one * 0.9 + (1 - one) * 0.1 / (V - 1)) * lp).sum(1).mean()

    right(program, hidden(N, D), weight(), labels(N))


@pytest.mark.parametrize("mask", [-1e9, -torch.inf])
def test_smoothing_over_a_masked_class_has_eager_gradients(mask: float) -> None:
    def program(h: Tensor, w: Tensor, bias: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(h, w) + bias, y, label_smoothing=0.1)

    bias = torch.zeros(V)
    bias[-1] = mask
    right(program, hidden(N, D), weight(), bias, labels(N, high=V - 1))
