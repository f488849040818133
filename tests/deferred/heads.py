"""A model that returns logits, compiled with the pass alone, and a counter of what runs on its logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from fusedhead.deferred import query, state, surroundings, tensor
from fusedhead.deferred.graph_outputs import DeferredLogits
from fusedhead.report.report import Report
from tests.eager_stack import backend

B, T, D, V = 2, 6, 16, 1024


class Model(nn.Module):
    """[B, T] tokens to [B, T, V] logits."""

    def __init__(self, after: Callable[[Tensor], Any] = lambda z: z, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, D)
        self.mix = nn.Linear(D, D)
        self.lm_head = nn.Linear(D, V, bias=False)
        self.after = after
        self.to(dtype)

    def forward(self, x: Tensor) -> Any:
        return self.after(self.lm_head(torch.tanh(self.mix(self.embed(x)))))


class WithLoss(Model):
    def forward(self, x: Tensor, y: Tensor | None = None) -> dict[str, Any]:
        z = super().forward(x)
        loss = None if y is None else F.cross_entropy(z[:, :-1].reshape(-1, V), y[:, 1:].reshape(-1))
        return {"loss": loss, "logits": z}


class Reversed(torch.autograd.Function):
    """The identity, whose gradient has the other sign."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        return z.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return -grad


def tokens(rows: int = B, length: int = T) -> Tensor:
    return torch.randint(0, V, (rows, length))


def deferring(model: nn.Module, reports: Report | None = None, logits: str = "deferred", **options: Any) -> Any:
    """``model`` through Dynamo and the pass, without Inductor."""
    report = Report() if reports is None else reports
    return torch.compile(model, backend=backend(report.extend, **{"fusedhead.logits": logits}), **options)


class Operations(TorchDispatchMode):
    """The names of the heads' ops that run, and of what makes something of [rows, V], out of sight too."""

    def __init__(self, rows: int = B * (T - 1)) -> None:
        super().__init__()
        self.rows = rows
        self.fused: list[str] = []
        self.large: list[str] = []

    def __enter__(self) -> Any:
        hiding = [patch.object(module, "out_of_sight", self.watching) for module in (state, query, tensor)]
        self.watched = ExitStack()
        for each in hiding:
            self.watched.enter_context(each)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.watched.close()

    @contextmanager
    def watching(self, hooks_see: bool = False) -> Iterator[None]:
        with surroundings.out_of_sight(hooks_see), Watched(self):
            yield

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.count(func, result)
        return result

    def count(self, func: Any, result: Any) -> None:
        results = result if isinstance(result, (tuple, list)) else [result]
        if any(isinstance(value, FakeTensor) for value in results):
            return
        if func.namespace == "fusedhead" and func._opname.startswith("head_"):
            self.fused.append(func._opname)
        for value in results:
            real = isinstance(value, Tensor)
            if real and value.numel() >= self.rows * V and value.shape[-1:] == (V,) and value.is_floating_point():
                self.large.append(func._opname)


class Watched(TorchDispatchMode):
    """What runs out of sight of other modes, counted."""

    def __init__(self, counter: Operations) -> None:
        super().__init__()
        self.counter = counter

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.counter.count(func, result)
        return result


def is_deferred(tensor: Any) -> bool:
    """Whether a tensor is deferred logits that were not computed so far."""
    return isinstance(tensor, DeferredLogits) and tensor._plain is None


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    for parameter in model.parameters():
        parameter.grad = None
    loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def compare(
    model: nn.Module, loss: Callable[[Any], Tensor], x: Tensor, rows: int = B * (T - 1), **tolerances: float
) -> Operations:
    """Value and gradients of ``loss(model(x))``, eager against deferred; what ran on the deferred logits."""
    expected = loss(model(x))
    wanted = gradients(model, expected)
    output = deferring(model)(x)
    with Operations(rows) as ran:
        value = loss(output)
        actual = gradients(model, value)
    limits = {"rtol": 1e-5, "atol": 1e-6, **tolerances}
    torch.testing.assert_close(value, expected, **limits)
    for got, want in zip(actual, wanted, strict=True):
        torch.testing.assert_close(got, want, **limits)
    return ran
