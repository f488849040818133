"""A step of an optimizer that writes the head is noticed; any other leaves deferred logits readable."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusedhead.deferred.graph_outputs import StaleLogits
from tests.deferred.heads import Model, deferring, tokens
from tests.deferred.losses import LOSSES, ROWS, Y


class Lion(torch.optim.Optimizer):
    """An optimizer of another package, which writes through ``.data``."""

    def __init__(self, parameters: Any, ungraded: bool = False) -> None:
        super().__init__(parameters, {})
        self.ungraded = ungraded

    def step(self, closure: Any = None) -> None:
        if closure is not None:
            closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.data.add_(p.grad.sign(), alpha=-0.1)
                elif self.ungraded:
                    p.data.add_(torch.randn(p.shape) * 0.01)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "fused SGD": lambda p: torch.optim.SGD(p, lr=0.1, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=False),
    "foreach AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
    "fused AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "fused Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, fused=True),
    "Adafactor": torch.optim.Adafactor,
    "another's": Lion,
}


def accuracy(z: Tensor) -> Tensor:
    return (z.argmax(-1) == Y).float().mean() + z.detach().sum()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_step_that_does_not_write_the_head_leaves_its_logits_readable(optimizer: str) -> None:
    def frozen(forward: Any, model: Model) -> Tensor:
        model.lm_head.requires_grad_(False)
        step = OPTIMIZERS[optimizer](model.parameters())
        z = forward()
        LOSSES["cross_entropy"](z).backward()
        step.step()
        return accuracy(z)

    def without_gradients(forward: Any, model: Model) -> Tensor:
        other = nn.Parameter(torch.ones(2))
        step = OPTIMIZERS[optimizer]([*model.parameters(), other])
        z = forward()
        other.grad = torch.ones(2)
        step.step()
        return LOSSES["cross_entropy"](z) + accuracy(z)

    for run in (frozen, without_gradients):
        results = []
        for deferred in (False, True):
            torch.manual_seed(0)
            model, x = Model(), tokens(ROWS)
            forward = deferring(model) if deferred else model
            results.append(run(lambda f=forward, x=x: f(x), model).detach())
        torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)
        torch._dynamo.reset()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_step_that_writes_the_head_is_noticed(optimizer: str) -> None:
    model, x = Model(), tokens(ROWS)
    run, step = deferring(model), OPTIMIZERS[optimizer](model.parameters())
    z = run(x)
    LOSSES["cross_entropy"](z).backward()
    step.step()
    with pytest.raises(StaleLogits):
        accuracy(z)
    step.zero_grad()
    z = run(x)
    step.step(lambda: LOSSES["cross_entropy"](model(x)).backward())
    with pytest.raises(StaleLogits):
        accuracy(z)


def test_a_write_without_a_gradient_by_anothers_optimizer_is_noticed() -> None:
    model, x = Model(), tokens(ROWS)
    run, step = deferring(model), Lion(model.lm_head.parameters(), ungraded=True)
    z = run(x)
    step.step()
    with pytest.raises(StaleLogits, match="stepped by an optimizer"):
        accuracy(z)


@pytest.mark.parametrize("found", [0.0, 1.0])
def test_a_fused_step_writes_unless_it_found_infinities(found: float) -> None:
    model, x = Model(), tokens(ROWS)
    run, step = deferring(model), torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    z, expected = run(x), accuracy(model(x))
    LOSSES["cross_entropy"](z).backward()
    step.grad_scale, step.found_inf = torch.ones(()), torch.tensor(found)
    step.step()
    if found:
        torch.testing.assert_close(accuracy(z), expected)
        step.found_inf = torch.zeros(())
        step.step()
    with pytest.raises(StaleLogits, match="stepped by an optimizer"):
        accuracy(z * 1)


@pytest.mark.parametrize("write", [lambda w: w.data.mul_(0.9), lambda w: w.detach().numpy().fill(0.5)])
def test_a_write_that_leaves_no_version_is_noticed_on_the_cpu(write: Any) -> None:
    model, x = Model(), tokens(ROWS)
    z = deferring(model)(x)
    write(model.lm_head.weight)
    with pytest.raises(StaleLogits, match=r"lm_head.weight.*through .data or by its memory"):
        z.sin()
