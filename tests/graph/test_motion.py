"""A loss of a student comes before its teacher is run, and a divergence of both behind: one sweep serves both losses.

Either the teacher is run before the first loss, or what is made of that loss waits; where neither may be moved, each
loss has a call of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.programs.claims import D, V, hidden, labels, right, weight

N = 6


def student(h: Tensor, w: Tensor) -> Tensor:
    return F.linear(h.tanh(), w)


def teacher(h: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        return F.linear(h.sin(), v)


def divergence(z: Tensor, t: Tensor) -> Tensor:
    return F.kl_div(F.log_softmax(z, -1), F.softmax(t, -1), reduction="batchmean")


def sum_of_both(h: Tensor, w: Tensor, v: Tensor, y: Tensor) -> Tensor:
    z = student(h, w)
    loss = F.cross_entropy(z, y)
    return loss + divergence(z, teacher(h, v))


def logged_in_between(h: Tensor, w: Tensor, v: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    z = student(h, w)
    loss = F.cross_entropy(z, y)
    perplexity = loss.detach().exp()
    return loss + divergence(z, teacher(h, v)), perplexity


def added_up(h: Tensor, w: Tensor, v: Tensor, y: Tensor) -> Tensor:
    z = student(h, w)
    total = 0.5 * F.cross_entropy(z, y)
    t = teacher(h, v)
    total = total + 0.5 * divergence(z, t)
    return total * 2


def both_ways(h: Tensor, w: Tensor, v: Tensor, y: Tensor) -> Tensor:
    first = student(h, w)
    one = F.cross_entropy(first, y)
    second = student(h.cos(), w)
    two = F.cross_entropy(second, y)
    return one + two + divergence(first, second)


def classes_of_two_calls(h: Tensor, w: Tensor, v: Tensor, y: Tensor) -> Tensor:
    pair = torch.stack([student(h, w)[:, 3], F.linear(h.sin(), v)[:, 5]], 1)
    return F.log_softmax(pair, 1)[:, 1].sum()


def fed_back(h: Tensor, w: Tensor, v: Tensor, y: Tensor) -> Tensor:
    z = student(h, w)
    loss = F.cross_entropy(z, y)
    return loss + divergence(z, teacher(h * loss.sigmoid(), v))


def drawn_in_between(h: Tensor, w: Tensor, v: Tensor, y: Tensor) -> Tensor:
    z = student(h, w)
    loss = F.cross_entropy(z, y)
    loss = F.dropout(loss, 0.5, training=True) * 0 + loss  # made of the loss, and draws
    t = F.linear(F.dropout(h.sin(), 0.5, training=True), v).detach()
    return loss + 0 * divergence(z, t)


def calls(report: Any) -> int:
    return report.after.count("torch.ops.fusedhead.head_rows")


TOGETHER = (sum_of_both, logged_in_between, added_up, both_ways, classes_of_two_calls)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("program", TOGETHER, ids=lambda program: program.__name__)
def test_one_call_serves_both(program: Callable[..., Any], frozen: bool) -> None:
    v = torch.randn(V, D, requires_grad=not frozen)
    report = right(program, hidden(N, D), weight(), v, labels(N), fused=2)
    assert calls(report) == 1


@pytest.mark.parametrize("program", [fed_back, drawn_in_between], ids=lambda program: program.__name__)
def test_each_has_its_own_where_nothing_may_be_moved(program: Callable[..., Any]) -> None:
    report = right(program, hidden(N, D), weight(), torch.randn(V, D), labels(N), fused=2)
    assert calls(report) == 2


def test_rows_that_are_picked_behind_the_first_loss_are_read_where_they_exist() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        z = student(h, w)
        spread = F.cross_entropy(z, y) + z.sinh().amax(-1).mean()
        rows = y.argsort()[:3]
        return spread + z[rows].sinh().amin(-1).mean()

    right(program, hidden(N, D), weight(), labels(N))
