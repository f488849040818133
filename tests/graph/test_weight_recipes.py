"""Returned logits whose weight the graph makes of its parameters: deferred, the weight made again for the loss.

Value and gradients are eager code's, no tensor of the logits' size is made, and what cannot be made again stays.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedhead import StaleLogits
from fusedhead.report.report import Report
from tests.deferred.heads import D, Operations, V, deferring, is_deferred

B, T, RANK = 8, 16, 4  # enough tokens to be deferred under no_grad too


class Weights(nn.Module):
    """A model whose head's weight is ``of`` its parameters."""

    def __init__(self, of: Callable[[Weights], Tensor], modes: Callable[[], object] | None = None) -> None:
        super().__init__()
        self.mix = nn.Linear(D, D)
        self.w = nn.Parameter(torch.randn(V, D) * 0.3)
        self.wide = nn.Parameter(torch.randn(V + 64, D) * 0.3)
        self.stored = nn.Parameter(torch.randn(D, V) * 0.3)
        self.halves = nn.ParameterList([nn.Parameter(torch.randn(V // 2, D) * 0.3) for _ in range(2)])
        self.down, self.up = nn.Parameter(torch.randn(RANK, D) * 0.3), nn.Parameter(torch.randn(V, RANK) * 0.3)
        self.length, self.scale = nn.Parameter(torch.rand(V, 1) + 0.5), nn.Parameter(torch.tensor(0.7))
        self.register_buffer("kept", torch.rand(V, D) > 0.3)
        self.register_buffer("int8", torch.randint(-127, 128, (V, D), dtype=torch.int8))
        self.register_buffer("step", torch.rand(V, 1) * 0.01)
        self.register_buffer("order", torch.randperm(V))
        self.of, self.modes = of, modes

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.mix(x))
        if self.modes is None:
            return F.linear(h, self.of(self))
        with self.modes():  # type: ignore[attr-defined]
            w = self.of(self)
        return F.linear(h, w)


def straight_through(m: Weights) -> Tensor:
    return m.w + (m.w.sign() * m.scale - m.w).detach()


def with_a_padded_class(m: Weights) -> Tensor:
    return F.pad(m.w, (0, 0, 0, 16))


def unbound(m: Weights) -> Tensor:
    first, second = m.wide[:V].chunk(2)
    return torch.cat([second, first])


FORMS: dict[str, Callable[[Weights], Tensor]] = {
    "sliced": lambda m: m.wide[:V],
    "narrowed": lambda m: m.wide.narrow(0, 64, V),
    "scaled": lambda m: m.w * 0.5,
    "scaled by a parameter": lambda m: m.w * m.scale,
    "divided": lambda m: m.w / D**0.5,
    "cast and back": lambda m: m.w.bfloat16().float(),
    "cast from float64": lambda m: m.w.double().float(),
    "normalised": lambda m: F.normalize(m.w, dim=-1),
    "weight norm": lambda m: m.length * m.w / m.w.norm(dim=1, keepdim=True),
    "centred": lambda m: m.w - m.w.mean(0),
    "with a merged adapter": lambda m: m.w + m.up @ m.down * 2,
    "masked": lambda m: m.w * m.kept,
    "masked by where": lambda m: torch.where(m.kept, m.w, 0.0),
    "dequantised": lambda m: m.int8.float() * m.step,
    "of two pieces": lambda m: torch.cat(list(m.halves)),
    "of two pieces, stacked": lambda m: torch.stack(list(m.halves)).view(V, D),
    "of two pieces of one": unbound,
    "permuted": lambda m: m.w[m.order],
    "embedded": lambda m: F.embedding(m.order, m.w),
    "copied": lambda m: m.w.clone(),
    "transposed and copied": lambda m: m.stored.t().contiguous(),
    "a sum of two": lambda m: m.w + m.stored.t(),
    "bounded": lambda m: torch.tanh(m.w),
    "without a gradient to one factor": lambda m: m.w.detach() * m.scale,
    "straight-through": straight_through,
    "padded": with_a_padded_class,
}


def loss(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z.flatten(0, 1), y.flatten())


def step(z: Tensor, model: Weights, y: Tensor) -> tuple[Tensor, list[Tensor | None]]:
    value = loss(z, y)
    return value.detach(), list(torch.autograd.grad(value, list(model.parameters()), allow_unused=True))


def alike(model: Weights, report: Report, **options: object) -> None:
    x, y = torch.randn(B, T, D), torch.randint(0, V, (B, T))
    run = deferring(model, report, **options)
    wanted = step(model(x), model, y)
    z = run(x)
    assert is_deferred(z)
    with Operations(B * T) as ran:
        actual = step(z, model, y)
    torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-6)
    assert ran.fused
    assert not ran.large
    torch.testing.assert_close(run(x).sin(), model(x).sin(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_logits_of_a_weight_made_of_parameters_are_deferred(form: str) -> None:
    report = Report()
    alike(Weights(FORMS[form]), report)
    (head,) = report.heads
    assert head.fused
    assert head.logits == "deferred"


@pytest.mark.parametrize("form", ["scaled", "with a merged adapter", "of two pieces"])
def test_a_weight_made_without_gradients_gets_none(form: str) -> None:
    alike(Weights(FORMS[form], torch.no_grad), Report())


def test_an_adapter_merged_under_autocast_is_rounded_as_it_was() -> None:
    model, report = Weights(FORMS["with a merged adapter"], lambda: torch.autocast("cpu", torch.bfloat16)), Report()
    alike(model, report)
    assert report.heads[0].fused


def test_batches_of_other_sizes_make_the_weight_again() -> None:
    model = Weights(FORMS["normalised"])
    run = deferring(model, dynamic=True)
    for rows in (B, B + 3, B + 5):
        x, y = torch.randn(rows, T, D), torch.randint(0, V, (rows, T))
        torch.testing.assert_close(step(run(x), model, y), step(model(x), model, y), rtol=1e-4, atol=1e-6)


def test_a_parameter_written_before_the_loss_raises() -> None:
    model = Weights(FORMS["with a merged adapter"])
    z = deferring(model)(torch.randn(B, T, D))
    with torch.no_grad():
        model.up.mul_(2)
    with pytest.raises(StaleLogits, match="up"):
        loss(z, torch.zeros(B, T, dtype=torch.int64))


def dropped(m: Weights) -> Tensor:
    return F.dropout(m.w, 0.1)


def written(m: Weights) -> Tensor:
    w = m.w * 2
    w[3] = 0
    return w


def written_through_a_view(m: Weights) -> Tensor:
    w = m.w * 2
    w[3:5].zero_()
    return w


def of_the_hidden_states(m: Weights) -> Tensor:
    large = (m.w[:, None] * torch.rand(1, 40, 1)).sum(1)
    return large * m.scale


@pytest.mark.parametrize("of", [dropped, written, written_through_a_view, of_the_hidden_states])
def test_what_cannot_be_made_again_stays(of: Callable[[Weights], Tensor]) -> None:
    model, x = Weights(of), torch.randn(B, T, D)
    torch.manual_seed(1)
    wanted = model(x)
    torch.manual_seed(1)
    actual = deferring(model)(x)
    assert not is_deferred(actual)
    torch.testing.assert_close(actual, wanted)
