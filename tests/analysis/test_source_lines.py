"""A head is named by the line and the module that tell it from other layers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.eager_stack import Rewritten

N, D, V = 64, 16, 2048


def project(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight.t()


class Layer(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        return project(x, self.weight)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = Layer(D, D)
        self.heads = nn.ModuleList(Layer(D, V) for _ in range(3))
        self.lm_head = nn.Linear(D, V)
        self.free = nn.Parameter(torch.randn(V, D))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = self.layer(x)
        loss = F.cross_entropy(self.lm_head(x), y)  # line 1
        loss = loss + F.cross_entropy(self.heads[2](x), y)  # line 2
        return loss + F.cross_entropy(project(x, self.free), y)  # line 3


def test_a_head_is_named_by_its_callers_line_and_its_module() -> None:
    rewritten = Rewritten(Model())
    rewritten(torch.randn(N, D), torch.randint(0, V, (N,)))
    first = Model.forward.__code__.co_firstlineno
    where = {head.where for head in rewritten.report.heads}
    assert where == {
        f"test_source_lines.py:{first + 2} (lm_head)",
        f"test_source_lines.py:{first + 3} (heads.2)",
        f"test_source_lines.py:{first + 4}",
    }
    assert {head.module for head in rewritten.report.heads} == {"lm_head", "heads.2", ""}


def test_a_wrapper_of_a_method_leaves_the_modules_their_names() -> None:
    model = Model()

    def wrapped(*args: Any, **kwargs: Any) -> Tensor:  # as accelerate wraps forward
        return Model.forward(*args, **kwargs)

    rewritten = Rewritten(wrapped)
    rewritten(model, torch.randn(N, D), torch.randint(0, V, (N,)))
    assert {head.module for head in rewritten.report.heads} == {"lm_head", "heads.2", ""}
