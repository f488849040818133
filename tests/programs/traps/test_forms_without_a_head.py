"""Products that are no head of a vocabulary (attention, routers, spans, sampled softmax) are left alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.programs.claims import B, D, T, V, hidden, labels, left, right, unseen, weight

# Dynamo looks at .grad of what crosses a graph break
LEAF = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@LEAF
def test_an_adaptive_softmax_is_not_seen() -> None:
    layer = torch.nn.AdaptiveLogSoftmaxWithLoss(D, V, cutoffs=[4, 8], div_value=1.5)

    def program(h: Tensor, y: Tensor) -> Tensor:
        return layer(h, y).loss

    unseen(program, hidden(B * T, D), labels(B * T))


def test_a_sampled_softmax_is_right() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor, negatives: Tensor) -> Tensor:
        positive = (h * w[y]).sum(-1, keepdim=True)
        return F.cross_entropy(torch.cat([positive, h @ w[negatives].t()], 1), torch.zeros_like(y))

    right(program, hidden(6, D), weight(), labels(6), labels(3))


def test_a_binary_loss_on_candidates_is_not_seen() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(h @ w.t(), F.one_hot(y, V).float())

    unseen(program, hidden(6, D), weight(), labels(6))


def test_a_weight_for_every_position_is_left_alone() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        z = torch.einsum("btd,tvd->btv", h, w)
        return F.cross_entropy(z.flatten(0, 1), y.flatten())

    left(program, hidden(), weight(T, V, D), labels(), because="not a projection onto a two-dimensional weight")


def test_a_span_head_over_positions_is_left_alone() -> None:
    def program(h: Tensor, w: Tensor, start: Tensor, end: Tensor) -> Tensor:
        first, last = F.linear(h, w).split(1, dim=-1)
        return F.cross_entropy(first.squeeze(-1), start) + F.cross_entropy(last.squeeze(-1), end)

    left(program, hidden(), weight(2, D), labels(B, high=T), labels(B, high=T), because="into single classes")


def test_attention_is_not_a_head() -> None:
    def program(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
        return (F.softmax(q @ k.transpose(1, 2), -1) @ k @ w.t()).sum()

    unseen(program, hidden(), hidden(), weight())


def test_a_log_softmax_over_keys_is_not_a_head() -> None:
    def program(q: Tensor, k: Tensor) -> Tensor:
        return F.log_softmax(q @ k.transpose(1, 2), -1).mean()

    unseen(program, hidden(), hidden())


def test_a_router_is_not_a_head() -> None:
    def program(h: Tensor, w: Tensor) -> Tensor:
        p = F.softmax(F.linear(h, w), -1)
        return (p.mean((0, 1)) * p.topk(2, -1).values.mean()).sum()

    unseen(program, hidden(), weight(4, D))


def test_ctc_is_not_seen() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        lp = F.log_softmax(F.linear(h, w), -1).transpose(0, 1)
        return F.ctc_loss(lp, y[:, :2], torch.full((B,), T), torch.full((B,), 2))

    unseen(program, hidden(), weight(), labels(B, 2, high=V - 1) + 1)
