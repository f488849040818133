"""Regions of activation checkpointing around logits, their losses, or both, and writes before the backward.

Eager code's backward computes the region once more, of what it finds then. So must every gradient here.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fusedhead.report import observers
from tests.eager_stack import Rewritten, backend

N, D, V = 24, 16, 1100
as_it_is_behind_us = backend(observers.notify)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix, self.head = nn.Linear(D, D), nn.Linear(D, V)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(x)))


LABELS = (torch.arange(N) * 7) % V


def mean(z: Tensor) -> Tensor:
    return F.cross_entropy(z, LABELS)


def written_after_a_read(z: Tensor) -> Tensor:
    z.sin().sum()
    return mean(z.mul_(2))


LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "cross_entropy": mean,
    "statistic": lambda z: z.logsumexp(-1).square().mean(),
    "two": lambda z: mean(z) + z.logsumexp(-1).square().mean(),
    "token_by_token": lambda z: z.log_softmax(-1).gather(1, LABELS[:, None]).exp().mean(),
    "divergence": lambda z: -(z.softmax(-1) * z.log_softmax(-1)).sum(-1).mean(),
    "numbers": lambda z: z.sin().cumsum(-1).mean(),
    "steps": lambda z: mean(3 * torch.tanh(z / 3)),
    "rows": lambda z: F.cross_entropy(z[3:], LABELS[3:]),
    "parts": lambda z: F.cross_entropy(z.chunk(2)[0], LABELS[: N // 2]) + z.chunk(2)[1].logsumexp(-1).mean(),
    "in_place": lambda z: mean(z.mul_(0.5)),
    "written_after_a_read": written_after_a_read,
    "metric_first": lambda z: z.detach().argmax(-1).sum() * 0.0 + mean(z),
}
WRITES: dict[str, Callable[[Model, Tensor], Any]] = {
    "nothing": lambda m, x: None,
    "trunk": lambda m, x: m.mix.weight.mul_(1.5),
    "tokens": lambda m, x: x.mul_(0.7),
    "head": lambda m, x: m.head.weight.mul_(1.3),
    "everything": lambda m, x: [p.mul_(1.2) for p in m.parameters()],
}


def region(run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return checkpoint(run, x, use_reentrant=False)


def twice(run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return region(lambda x: region(run, x), x)


PLACES: dict[str, Callable[[Any, Any, Tensor], Tensor]] = {
    "loss outside": lambda model, loss, x: loss(region(model, x)),
    "loss inside": lambda model, loss, x: region(lambda x: loss(model(x)), x),
    "a step inside": lambda model, loss, x: loss(region(lambda x: torch.tanh(model(x)), x)),
    "loss in an outer region": lambda model, loss, x: region(lambda x: loss(region(model, x)), x),
    "two regions": lambda model, loss, x: loss(twice(model, x)),
    "reentrant": lambda model, loss, x: loss(checkpoint(model, x.requires_grad_(), use_reentrant=True)),
}


def outcome(model: Model, run: Any, place: str, loss: Callable[[Tensor], Tensor], write: str) -> Any:
    """Loss and gradients, or the kind of error of the backward."""
    torch.manual_seed(0)
    x = torch.randn(N, D)
    model.load_state_dict(Model().state_dict())
    model.zero_grad()
    value = PLACES[place](run, loss, x)
    with torch.no_grad():
        WRITES[write](model, x)
    try:
        value.backward()
    except RuntimeError as error:
        return type(error)
    return [value.detach(), *(p.grad for p in model.parameters())]


def check(place: str, programs: Iterable[tuple[str, str]], compiled: Callable[[Any], Any] = lambda loss: loss) -> None:
    real, other = Model(), Model()
    ours = Rewritten(other)
    for loss, write in programs:
        expected = outcome(real, real, place, LOSSES[loss], write)
        found = outcome(other, ours, place, compiled(LOSSES[loss]), write)
        if isinstance(expected, type):
            assert found == expected, (loss, write)
            continue
        for got, exact in zip(found, expected, strict=True):
            torch.testing.assert_close(got, exact, rtol=1e-5, atol=1e-7, msg=lambda m, at=(loss, write): f"{at}: {m}")
    assert sum(head.run.deferred.value for head in ours.report.heads) > 0, "no logits were deferred"


@pytest.mark.parametrize("place", PLACES)
def test_gradients_are_of_what_the_second_pass_computes(place: str) -> None:
    check(place, [("cross_entropy", write) for write in WRITES])
    check(place, itertools.product(LOSSES, ("nothing", "everything")))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # Dynamo asks, and hides the warning
@pytest.mark.parametrize("place", [place for place in PLACES if place != "reentrant"])
def test_a_compiled_loss_in_or_behind_a_region_is_right_from_its_first_call(place: str) -> None:
    """Which compiles it, in a region that counts what is saved."""
    programs = [("cross_entropy", "nothing"), ("cross_entropy", "trunk")]
    check(place, programs, lambda loss: torch.compile(loss, backend=as_it_is_behind_us))


def test_a_loss_in_the_region_of_its_logits_stays_fused_and_one_behind_it_has_them_built() -> None:
    for place, (deferred, answered, built) in {"loss inside": (2, 1, 0), "loss outside": (2, 0, 1)}.items():
        model, x = Rewritten(Model()), torch.randn(N, D)
        PLACES[place](model, mean, x).backward()
        (head,) = model.report.heads
        run = head.run
        assert (run.deferred.value, run.answered.value, run.built.total) == (deferred, answered, built), place


def test_a_metric_without_gradients_behind_a_region_is_answered() -> None:
    model, x = Rewritten(Model()), torch.randn(N, D)
    z = region(model, x)
    with torch.no_grad():
        loss = mean(z)
    torch.testing.assert_close(loss, mean(z.detach()))
    (head,) = model.report.heads
    assert (head.run.answered.value, head.run.built.total) == (2, 0)


def steps_of(z: Tensor) -> dict[str, Callable[[], Tensor]]:
    return {"tanh": lambda: torch.tanh(z), "exp": lambda: torch.exp(z), "softmax": lambda: torch.softmax(z, -1)}


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("step", ["tanh", "exp", "softmax"])
def test_a_result_that_is_written_to_after_it_was_saved_is_an_error_as_in_eager_code(step: str, hooked: bool) -> None:
    """What the logits are made of is computed out of sight of hooks, and is no less watched for that."""
    found = []
    for ours in (False, True):
        torch.manual_seed(0)
        model = Model()
        z = (Rewritten(model) if ours else model)(torch.randn(N, D))
        probabilities = steps_of(z)[step]()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t) if hooked else torch.enable_grad():
            probabilities.sin().cumsum(-1)  # which reads them
        loss = mean(probabilities.mul_(2))
        try:
            loss.backward()
            found.append("")
        except RuntimeError as error:
            found.append(str(error).partition("[")[0])
    assert found[0] == found[1] != ""
