"""A number written where a mask picks tokens, or tokens and classes: read where Dynamo traces masks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.eager_stack import Rewritten

B, T, D, V = 4, 16, 16, 1024


MASK_CLASS = V - 1


X0 = torch.randint(0, V - 1, (B, T), generator=torch.Generator().manual_seed(1))


XT = torch.where(torch.rand(B, T, generator=torch.Generator().manual_seed(2)) < 0.5, MASK_CLASS, X0)


class Model(nn.Module):
    def __init__(self, after: Callable[[Tensor], Tensor] = lambda z: z) -> None:
        super().__init__()
        self.mix, self.head, self.after = nn.Linear(D, D), nn.Linear(D, V), after
        self.offset = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.head(torch.tanh(self.mix(x))))


def gradients(model: nn.Module, value: Tensor) -> list[Tensor | None]:
    return [value.detach(), *torch.autograd.grad(value, list(model.parameters()), allow_unused=True)]


@pytest.mark.parametrize("number", [0.0, -float("inf")])
@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_one_class_of_some_tokens_is_set_where_dynamo_traces_masks(number: float) -> None:
    def after(z: Tensor) -> Tensor:
        unmasked = XT != MASK_CLASS
        z[unmasked, XT[unmasked]] = number
        return F.cross_entropy(z.flatten(0, 1), (X0.flatten() + 1) % V)

    model, x = Model(after), torch.randn(B, T, D)
    run = Rewritten(model)
    torch.testing.assert_close(gradients(model, run(x)), gradients(model, model(x)), rtol=1e-4, atol=1e-6)
    assert [head.fused for head in run.report.heads] == [True]
