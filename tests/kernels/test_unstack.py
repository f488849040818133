"""Unstacking: what reads a stack of matrices reads the matrices, and no stack is built where all of it can."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from fusedhead.kernels.tokenwise.unstack import unstack

aten = torch.ops.aten


def mixture(a: Tensor, b: Tensor) -> Tensor:
    return torch.stack([a + 0.3, b - 2], 1).logsumexp([1])


def gradient(a: Tensor, b: Tensor) -> Tensor:
    s = torch.stack([a, b], 1)
    return (s - s.logsumexp([1]).unsqueeze(1)).exp().mul(a.unsqueeze(1)).select(1, 0) * 3


def total(a: Tensor, b: Tensor) -> Tensor:
    return (torch.stack([a, b, a * b], 1) * 2).sum([1])


def kept(a: Tensor, b: Tensor) -> Tensor:
    return torch.stack([a, b], 1).cumsum(1).select(1, 1)


CASES = {mixture: 0, gradient: 0, total: 0, kept: 1}  # stacks that stay


@pytest.mark.parametrize("function", CASES, ids=lambda f: f.__name__)
def test_values_stay(function: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(2, 5, 9)
    a[0, 0] = b[0, 0] = -math.inf  # a class that both mask
    a[1, 1], b[2, 2], a[3, 3] = math.inf, math.nan, -math.inf
    graph = make_fx(function, tracing_mode="fake")(a, b)
    before = graph(a, b)
    unstack(graph.graph)
    graph.recompile()
    torch.testing.assert_close(graph(a, b), before, equal_nan=True)
    assert len(graph.graph.find_nodes(op="call_function", target=aten.stack.default)) == CASES[function]
