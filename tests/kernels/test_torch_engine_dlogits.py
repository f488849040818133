"""The gradients of statistics for any upstream are those of their definitions, on the torch engine."""

from __future__ import annotations

import pytest
import torch

from fusedhead.kernels.contract import DIFFERENTIABLE_STATS, STATS
from tests.lowering.heads import ALL, OPS, leaves, operands, truth

TRANSFORMS = (
    "",
    "mul:0.5",
    "addcol:0",
    "mul:0.0333 tanh mul:30.0",
    "mulrow:0 addcol:0 sigmoid mulcol:1 addrow:0 add:0.25",
)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("memory", [0, -1])
def test_every_gradient_is_the_definitions(transform, memory):
    o = operands(131, 1507, 23, 3)
    o.y[:, 1] = o.y[:, 0]  # the same column twice in a row
    ours, true = leaves(o), leaves(o)
    wanted = [ours.h, ours.w, ours.cols, ours.rows]
    results, definition = OPS.head_stats(*ours, transform, ",".join(STATS), memory), truth(true, transform)
    got = [results[STATS.index(name)] for name in DIFFERENTIABLE_STATS]
    expected = [getattr(definition, name) for name in DIFFERENTIABLE_STATS]
    upstream = [torch.randn_like(x) for x in expected]
    ours_grad = torch.autograd.grad(got, wanted, upstream)
    true_grad = torch.autograd.grad(
        expected, [true.h, true.w, true.cols, true.rows], upstream, allow_unused=True, materialize_grads=True
    )
    for a, b in zip((*got, *ours_grad), (*expected, *true_grad)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_gradient_of_the_softmax_alone_is_the_definitions(transform):
    o = operands(131, 1507, 23, 1)
    ours, true = leaves(o), leaves(o)
    got = OPS.head_stats(*ours, transform, "lse,picked", 0)[:2]
    expected = truth(true, transform)[:2]
    upstream = [torch.randn_like(x) for x in expected]
    a = torch.autograd.grad(got, [ours.h, ours.w], upstream)
    b = torch.autograd.grad(expected, [true.h, true.w], upstream)
    for x, y in zip((*got, *a), (*expected, *b)):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("transform", ["", "mul:2.0", "addcol:0 tanh mul:300.0"])
@pytest.mark.parametrize("stats", ["picked", "sum", "picked,sum"])
def test_labels_and_sums_alone_have_the_definitions_gradients(stats, transform):
    o = operands(70, 1507, 23, 2)
    ours, true = leaves(o), leaves(o)
    got = dict(zip(ALL.split(","), OPS.head_stats(*ours, transform, stats, 0)))
    expected = truth(true, transform)
    names = stats.split(",")
    upstream = [torch.randn_like(got[name]) for name in names]
    a = torch.autograd.grad([got[name] for name in names], [ours.h, ours.w, ours.cols], upstream)
    b = torch.autograd.grad(
        [getattr(expected, name) for name in names],
        [true.h, true.w, true.cols],
        upstream,
        allow_unused=True,
        materialize_grads=True,
    )
    for x, y in zip(a, b):
        torch.testing.assert_close(x, y)
