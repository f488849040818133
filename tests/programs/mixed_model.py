"""A small model whose head is given as a function, and what is right of it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tests.eager_stack import Rewritten

N, D, V, K = 24, 16, 1024, 3


Y = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(1))


YK = torch.randint(0, V, (N, K), generator=torch.Generator().manual_seed(2))


class Model(nn.Module):
    def __init__(self, of: Callable[[Model, Tensor], Tensor]) -> None:
        super().__init__()
        self.mix, self.of = nn.Linear(D, D), of
        self.w = nn.Parameter(torch.randn(V, D) * 0.3)
        self.several, self.biases = nn.Parameter(torch.randn(V, K, D) * 0.3), nn.Parameter(torch.randn(V, K))

    def forward(self, x: Tensor) -> Tensor:
        return self.of(self, torch.tanh(self.mix(x)))


def gradients(model: nn.Module, value: Tensor) -> list[Tensor | None]:
    return [value.detach(), *torch.autograd.grad(value, list(model.parameters()), allow_unused=True)]


def right(of: Callable[[Model, Tensor], Tensor], **compile_options: object) -> Rewritten:
    model, x = Model(of), torch.randn(N, D)
    run = Rewritten(model, **compile_options)  # type: ignore[arg-type]
    torch.testing.assert_close(gradients(model, run(x)), gradients(model, model(x)), rtol=1e-4, atol=1e-5)
    assert not run.report.errors
    return run
