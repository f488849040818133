"""Rows that are not numbers: NaN, infinite or masked logits give what eager code gives, forward and backward.

One difference is known: under a bare ``logsumexp`` a row with a logit of +inf has, in eager code, a gradient of zero
for its other classes; fused it is NaN there too, as it is under every softmax.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.programs.claims import D, V, hidden, right, weight

N = 6


def operands(broken: str) -> list[Tensor]:
    h, w, y = hidden(N, D), weight(), torch.randint(0, V, (N,))
    bias, row = torch.randn(V), torch.randn(N)
    with torch.no_grad():
        what, _, where = broken.partition(" in ")
        value = {"+inf": math.inf, "-inf": -math.inf, "nan": math.nan}[what]
        ignored = where.endswith(", ignored")
        place = where.removesuffix(", ignored")
        if place == "a class":
            bias[3] = value
            y[y == 3] = 4
        elif place == "the class of a label":
            bias[3] = value
            y[2] = 3
        elif place == "a row":
            row[2] = value
        else:
            h[2, 1] = value
        if ignored:
            y[2] = -100
    return [h, w, y, bias.requires_grad_(), row]


def logits(h: Tensor, w: Tensor, bias: Tensor, row: Tensor) -> Tensor:
    return F.linear(h, w, bias) + row[:, None]


def mean_loss(h, w, y, bias, row):
    return F.cross_entropy(logits(h, w, bias, row), y)


def losses(h, w, y, bias, row):
    return F.cross_entropy(logits(h, w, bias, row), y, reduction="none")


def smoothed(h, w, y, bias, row):
    return F.cross_entropy(logits(h, w, bias, row), y, label_smoothing=0.1)


def smoothed_losses(h, w, y, bias, row):
    return F.cross_entropy(logits(h, w, bias, row), y, label_smoothing=0.1, reduction="none")


def weighted(h, w, y, bias, row):
    return F.cross_entropy(logits(h, w, bias, row), y, weight=torch.linspace(0.1, 1, V))


def log_probs(h, w, y, bias, row):
    return F.log_softmax(logits(h, w, bias, row), 1).gather(1, y.clamp(min=0)[:, None])


def mean_log_prob(h, w, y, bias, row):
    return log_probs(h, w, y, bias, row).mean()


def summed_log_probs(h, w, y, bias, row):
    return F.log_softmax(logits(h, w, bias, row), 1).sum(1)


def with_z_loss(h, w, y, bias, row):
    z = logits(h, w, bias, row)
    return F.cross_entropy(z, y) + 0.1 * (z.logsumexp(1) ** 2).mean()


def entropy(h, w, y, bias, row):
    logp = F.log_softmax(logits(h, w, bias, row), 1)
    return -(logp.exp() * logp).sum(1)


def bare_normaliser(h, w, y, bias, row):
    return logits(h, w, bias, row).logsumexp(1)


PROGRAMS = [mean_loss, losses, smoothed, smoothed_losses, weighted, log_probs, mean_log_prob, summed_log_probs]
PROGRAMS += [with_z_loss, entropy]
BROKEN = ["+inf in a class", "+inf in a hidden state", "+inf in a row, ignored"]
MASKED = ["-inf in a class", "-inf in the class of a label", "-inf in a row", "-inf in a row, ignored"]
MASKED += ["nan in a hidden state", "nan in a hidden state, ignored"]


@pytest.mark.parametrize("broken", [*BROKEN, *MASKED])
@pytest.mark.parametrize("program", PROGRAMS)
def test_a_softmax_of_what_is_no_number(program, broken):
    right(program, *operands(broken))


@pytest.mark.parametrize("broken", MASKED)
def test_a_logsumexp_of_what_is_no_number(broken):
    right(bare_normaliser, *operands(broken))


def test_a_logsumexp_of_an_infinite_logit_is_infinite():
    h, w, y, bias, row = operands("+inf in a row")
    with torch.no_grad():
        right(bare_normaliser, h, w, y, bias, row)


def test_a_loss_of_an_infinite_logit_is_nan_through_inductor_as_well():
    h, w, y, bias, row = operands("+inf in a class")
    loss = torch.compile(mean_loss, backend="fusedhead")(h, w, y, bias, row)
    loss.backward()
    assert loss.isnan()
    assert w.grad.isnan().all()
    assert h.grad.isnan().all()
