"""Infinite and undefined numbers anywhere in a head's operands, in every statistic that is a weighted sum.

A weight of zero times an infinity is NaN, and an infinity less itself too: a sum that is taken apart has other products
than the program's. So each program here is run on drawn operands, with an infinity or a NaN in the hidden states, the
weight, the bias, a mask or a coefficient, and what comes out must be infinite, NaN or finite where eager code's is.
Three differences are known: gradients under a bare ``logsumexp`` that is +inf (`test_infinite_logits`); infinite class
weights together with label smoothing, which give NaN for an infinite loss; and, where the hidden states or the weight
are not finite, a gradient may be NaN for infinite, for the label's part of it has a product of its own.

    FUSEDHEAD_SPECIAL_VALUES=500 python -m pytest tests/programs/traps/test_special_values.py    # deeper
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.eager_stack import Rewritten

N, D, V = 4, 3, 7
EXAMPLES = int(os.environ.get("FUSEDHEAD_SPECIAL_VALUES", 8))
SPECIAL = st.sampled_from((math.inf, -math.inf, math.nan))
LEAST = st.sampled_from((-math.inf, -math.inf, -1e30))
LEAST_FINITE = torch.finfo(torch.float32).min
HUGE = 1e35
Operands = tuple[Tensor, ...]
Loss = Callable[..., Tensor]


def one_hot(z: Tensor, y: Tensor, c: Tensor) -> Tensor:
    return -(F.one_hot(y, V).float() * z.log_softmax(-1)).sum(-1)


def scattered(z: Tensor, y: Tensor, c: Tensor) -> Tensor:
    return -(torch.zeros_like(z).scatter(1, y[:, None], 1.0) * z.log_softmax(-1)).sum(-1)


def smoothed(z: Tensor, y: Tensor, c: Tensor) -> Tensor:
    return -(torch.full_like(z, 0.1 / V).scatter_(1, y[:, None], 0.9) * z.log_softmax(-1)).sum(-1)


def smoothed_flatly(z: Tensor, y: Tensor, c: Tensor) -> Tensor:
    return -(torch.full_like(z, 0.5).scatter_(1, y[:, None], 0.1) * z.log_softmax(-1)).sum(-1)


def smoothed_without_label(z: Tensor, y: Tensor, c: Tensor) -> Tensor:
    return -((1 - F.one_hot(y, V).float()) * z.log_softmax(-1)).sum(-1)


def against_the_label(z: Tensor, y: Tensor, c: Tensor) -> Tensor:
    return (torch.full_like(z, 0.5).scatter_(1, y[:, None], -1.0) * z.log_softmax(-1)).sum(-1)


def one_hot_of_the_logits(z: Tensor, y: Tensor, c: Tensor) -> Tensor:
    return z.logsumexp(-1) - (F.one_hot(y, V) * z).sum(-1)


def smoothed_logits(z: Tensor, y: Tensor, c: Tensor) -> Tensor:
    return z.logsumexp(-1) - ((F.one_hot(y, V) * 0.9 + 0.1 / V) * z).sum(-1)


def divergence(z: Tensor, y: Tensor, c: Tensor) -> Tensor:
    return F.kl_div(z.log_softmax(-1), F.one_hot(y, V).float(), reduction="none").sum(-1)


def soft_targets(z: Tensor, y: Tensor, c: Tensor) -> Tensor:
    return F.cross_entropy(z, (c / c.sum()).expand(N, V), reduction="none")


def weighted_by_class(z: Tensor, y: Tensor, c: Tensor) -> Tensor:
    return F.cross_entropy(z, y, weight=c, reduction="none")


def weighted_mean(z: Tensor, y: Tensor, c: Tensor) -> Tensor:
    return F.cross_entropy(z, y, weight=c)


def weighted_and_smoothed(z: Tensor, y: Tensor, c: Tensor) -> Tensor:
    return F.cross_entropy(z, y, weight=c, label_smoothing=0.1, reduction="none")


def smoothed_by_torch(z: Tensor, y: Tensor, c: Tensor) -> Tensor:
    return F.cross_entropy(z, y, label_smoothing=0.1, ignore_index=2)


def smoothed_wholly(z: Tensor, y: Tensor, c: Tensor) -> Tensor:
    return F.cross_entropy(z, y, label_smoothing=1.0, reduction="none")


def ignored(z: Tensor, y: Tensor, c: Tensor) -> Tensor:
    return F.cross_entropy(z, y, ignore_index=2, reduction="sum")


def weighted_rows(z: Tensor, y: Tensor, c: Tensor) -> Tensor:
    return (F.cross_entropy(z, y, reduction="none") * c[:N]).sum() / c[:N].sum()


def masked_rows(z: Tensor, y: Tensor, c: Tensor) -> Tensor:
    return F.cross_entropy(z, y, reduction="none").masked_fill(y == 2, 0.0).sum()


def entropy(z: Tensor, y: Tensor, c: Tensor) -> Tensor:
    lp = z.log_softmax(-1)
    return -(lp.exp() * lp).sum(-1)


def entropy_of_softmax(z: Tensor, y: Tensor, c: Tensor) -> Tensor:
    return -(z.softmax(-1) * z.log_softmax(-1)).sum(-1)


def expected_logit(z: Tensor, y: Tensor, c: Tensor) -> Tensor:
    return z.logsumexp(-1) - (z.softmax(-1) * z).sum(-1)


def mean_log_prob(z: Tensor, y: Tensor, c: Tensor) -> Tensor:
    return z.log_softmax(-1).mean(-1)


def scaled_by_class(z: Tensor, y: Tensor, c: Tensor) -> Tensor:
    return F.cross_entropy(z * c, y, reduction="none")


def scaled_by_zero(z: Tensor, y: Tensor, c: Tensor) -> Tensor:
    return F.cross_entropy(z * 0.0, y, reduction="none")


def scaled_by_row(z: Tensor, y: Tensor, c: Tensor) -> Tensor:
    return F.cross_entropy(z * c[:N, None], y, reduction="none")


def capped(z: Tensor, y: Tensor, c: Tensor) -> Tensor:
    return F.cross_entropy(3 * torch.tanh(z / 3), y, reduction="none")


def picked_log_prob(z: Tensor, y: Tensor, c: Tensor) -> Tensor:
    return z.log_softmax(-1).gather(1, y[:, None])[:, 0] * c[:N]


def subtracted(z: Tensor, y: Tensor, c: Tensor) -> Tensor:
    return z.gather(1, y[:, None])[:, 0] - z.logsumexp(-1)


def with_z_loss(z: Tensor, y: Tensor, c: Tensor) -> Tensor:
    return F.cross_entropy(z, y) + 0.1 * (z.log_softmax(-1).gather(1, y[:, None]) * 0).sum()


LOSSES: list[Loss] = [
    one_hot, scattered, smoothed, smoothed_flatly, smoothed_without_label, against_the_label, one_hot_of_the_logits,
    smoothed_logits, divergence, soft_targets, weighted_by_class, weighted_mean, weighted_and_smoothed,
    smoothed_by_torch, smoothed_wholly, ignored, weighted_rows, masked_rows, entropy, entropy_of_softmax,
    expected_logit, mean_log_prob, scaled_by_class, scaled_by_zero, scaled_by_row, capped, picked_log_prob, subtracted,
    with_z_loss,
]  # fmt: skip


@st.composite
def operands(draw: st.DrawFn) -> Operands:
    """h [N, D], w [V, D], bias [V], coefficients [V], labels [N], with up to three special rows, classes or entries."""
    torch.manual_seed(draw(st.integers(0, 20)))
    h, w, bias, c = torch.randn(N, D), torch.randn(V, D), torch.randn(V), torch.rand(V) + 0.1
    y = torch.tensor(draw(st.lists(st.integers(0, V - 1), min_size=N, max_size=N)))
    kinds = st.sampled_from(("label", "class", "class", "h", "w", "zero", "c", "zeros"))
    for what in draw(st.lists(kinds, max_size=3)):
        if what == "label":
            bias[y[draw(st.integers(0, N - 1))]] = draw(LEAST)
        elif what == "class":
            bias[draw(st.integers(0, V - 1))] = draw(LEAST)
        elif what == "h":
            h[draw(st.integers(0, N - 1)), draw(st.integers(0, D - 1))] = draw(SPECIAL)
        elif what == "w":
            w[draw(st.integers(0, V - 1)), draw(st.integers(0, D - 1))] = draw(SPECIAL)
        elif what == "zero":
            h[draw(st.integers(0, N - 1))] = 0
        elif what == "zeros":
            c[draw(st.lists(st.integers(0, V - 1), min_size=1))] = 0
        else:
            c[draw(st.integers(0, V - 1))] = draw(SPECIAL)
    return h, w, bias, c, y


def step(program: Loss, inputs: Operands) -> list[Tensor]:
    """The loss and the gradients of h, w and the bias."""
    leaves = [x.clone().requires_grad_() for x in inputs[:3]]
    loss = program(*leaves, *inputs[3:])
    upstream = torch.linspace(0.5, 1.5, loss.numel()).view(loss.shape)
    return [loss.detach(), *torch.autograd.grad(loss, leaves, upstream)]


BARE = (one_hot_of_the_logits, smoothed_logits, expected_logit, subtracted)  # a logsumexp, and no softmax


def logits(h: Tensor, w: Tensor, bias: Tensor, fill: float | None) -> Tensor:
    """With a bias, or with classes of a small bias set to ``fill``."""
    return F.linear(h, w, bias) if fill is None else F.linear(h, w, bias.clamp(min=-2)).masked_fill(bias < -2, fill)


def compared(loss: Loss, fill: float | None, h: Tensor, w: Tensor, bias: Tensor, c: Tensor, y: Tensor) -> int:
    """How many of the loss and the gradients are eager code's."""
    if loss is weighted_and_smoothed and not bool(c.isfinite().all()):
        return 0
    return 1 if loss in BARE and bool((logits(h, w, bias, fill).logsumexp(-1) == math.inf).any()) else 4


def said(name: str, message: str) -> str:
    return f"{name}: {message}"


@pytest.mark.parametrize("fill", [None, -math.inf, LEAST_FINITE], ids=["biased", "masked", "masked with the least"])
@pytest.mark.parametrize("loss", LOSSES)
def test_what_is_not_finite_is_what_eager_code_has(loss: Loss, fill: float | None) -> None:
    def program(h: Tensor, w: Tensor, bias: Tensor, c: Tensor, y: Tensor) -> Tensor:
        return loss(logits(h, w, bias, fill), y, c)

    torch.compiler.reset()
    rewritten = Rewritten(program)

    @settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None)
    @given(operands())
    def alike(inputs: Operands) -> None:
        names = ("loss", "h", "w", "bias")[: compared(loss, fill, *inputs)]
        broken = not all(bool(x.isfinite().all()) for x in inputs[:2])
        for name, ours, wanted in zip(names, step(rewritten, inputs), step(program, inputs)):
            if broken and name != "loss":  # one that is not finite
                ours, wanted = (x.where(x.isfinite(), math.nan) for x in (ours, wanted))
            if fill == LEAST_FINITE:  # a sum with it is infinite, or nearly, and so in one of two ways to take it
                ours, wanted = (x.where(x.abs() < HUGE, x * math.inf) for x in (ours, wanted))
                ours = torch.where(ours.isfinite() & ~wanted.isfinite(), wanted, ours)
            torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5, equal_nan=True, msg=partial(said, name))

    alike()
    assert not rewritten.report.errors
