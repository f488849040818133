"""A model that multiplies by its embedding itself, under every spelling of the product."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.eager.models import D, V

PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "F.linear": lambda h, w: F.linear(h, w),
    "F.linear, by name": lambda h, w: F.linear(input=h, weight=w, bias=None),
    "@ w.T": lambda h, w: h @ w.T,
    "@ w.t()": lambda h, w: h @ w.t(),
    "matmul, transpose": lambda h, w: torch.matmul(h, w.transpose(0, 1)),
    "method, mT": lambda h, w: h.matmul(w.mT),
    "mm": lambda h, w: torch.mm(h.flatten(0, 1), w.permute(1, 0)).view(*h.shape[:-1], V),
}


class Mix(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class Tied(nn.Module):
    """A model that multiplies by its embedding itself."""

    def __init__(self, product: str = "F.linear") -> None:
        super().__init__()
        self.product = product
        self.embed, self.mix = nn.Embedding(V, D), Mix()

    def hidden(self, x: Tensor) -> Tensor:
        return torch.tanh(self.mix(self.embed(x)))

    def forward(self, x: Tensor) -> Tensor:
        return PRODUCTS[self.product](self.hidden(x), self.embed.weight)

    def calculate_loss(self, x: Tensor, y: Tensor) -> Tensor:
        logits = torch.matmul(self.hidden(x), self.embed.weight.transpose(0, 1))
        return F.cross_entropy(logits.flatten(0, 1), y.flatten())
