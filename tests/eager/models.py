"""A model with a head that nobody compiles, a batch, a step, and the comparison with eager code and float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

V, D = 1024, 16
ORIGINAL = nn.Linear.forward


class Model(nn.Module):
    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.embed, self.mix, self.lm_head = nn.Embedding(V, D), nn.Linear(D, D), nn.Linear(D, V, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.lm_head(torch.tanh(self.mix(self.embed(x))))

    def calculate_loss(model, x: Tensor, y: Tensor) -> Tensor:  # named as some name it
        return F.cross_entropy(model.forward(x).flatten(0, 1), y.flatten())


def batch(rows: int = 4, length: int = 32) -> tuple[Tensor, Tensor]:
    return torch.randint(0, V, (rows, length)), torch.randint(0, V, (rows, length))


def step(model: nn.Module, x: Tensor, y: Tensor, loss: Callable[..., Tensor] = F.cross_entropy) -> list[Tensor]:
    model.zero_grad()
    value = loss(model(x).flatten(0, 1), y.flatten())
    value.backward()
    return [value.detach(), *(p.grad for p in model.parameters())]  # type: ignore[misc]


def same(ours: list[Tensor], plain: list[Tensor], exact: list[Tensor]) -> None:
    for got, eager, true in zip(ours, plain, exact, strict=True):
        least = 4 * torch.finfo(eager.dtype).eps * true.abs().max()
        assert (got - true).abs().max() <= torch.maximum(1.5 * (eager - true).abs().max(), least)


class Functions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Ops(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def under_a_mode(mode: Callable[[], Any]) -> Callable[[nn.Module, Tensor], Any]:
    def run(model: nn.Module, x: Tensor) -> Any:
        with mode():
            return model(x)

    return run
