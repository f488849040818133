"""A masked diffusion language model of MDLM's shape: clean tokens, masked ones, and the class of the mask."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

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
