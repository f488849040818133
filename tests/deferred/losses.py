"""Losses of deferred logits, and the comparison of a program with eager code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.deferred.heads import Model, T, V, deferring, tokens

ROWS = 16  # times T: enough tokens for logits without gradients to be deferred

Y = torch.randint(0, V, (ROWS, T), generator=torch.Generator().manual_seed(1))

LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "cross_entropy": lambda z: F.cross_entropy(z.flatten(0, 1), Y.flatten()),
    "log_softmax and gather": lambda z: z.log_softmax(-1).gather(-1, Y[..., None]).mean(),
    "logsumexp": lambda z: z.logsumexp(-1).mean(),
    "entropy": lambda z: torch.distributions.Categorical(logits=z).entropy().mean(),
    "the numbers": lambda z: z.sin().mean(),
}


def same(run: Callable[[Callable[..., Any], Model], Tensor]) -> Any:
    """``run(forward, model)`` with the model itself and deferred: the values and all gradients, or the errors."""
    torch.manual_seed(0)
    model, x = Model(), tokens(ROWS)
    compiled = deferring(model)
    actual = []
    for forward in (model, compiled):
        model.requires_grad_(True)
        model.zero_grad()
        try:
            loss = run(lambda forward=forward: forward(x), model)
        except Exception as error:
            actual.append((type(error), str(error)))
            continue
        if loss.requires_grad:
            model.requires_grad_(True)
            loss.backward()
        actual.append((loss.detach(), loss.requires_grad, loss.is_inference(), [p.grad for p in model.parameters()]))
    expected, got = actual
    if isinstance(expected[0], type):
        assert got == expected
    else:
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    return expected
