"""head_loss: statistics that stay differentiable, with gradients that the same sweep has computed."""

from __future__ import annotations

import pytest
import torch

from tests.lowering.heads import OPS, RAGGED, leaves, none, operands, truth

TRANSFORMS = ("", "mul:0.5", "addcol:0 mul:2.0 addcol:1", "mul:0.1 tanh mul:3.0", "mulrow:0 sigmoid mulcol:1")


def linear_loss(stats, c, square):
    """Σ c · statistics + Σ square lse²: what head_loss promises gradients for."""
    lse, picked, total = stats[:3]
    return (lse * c[0]).sum() + (picked * c[1]).sum() + (total * c[2]).sum() + (lse * lse * square).sum()


def coefficients(o):
    n, k = o.y.shape
    wide = o.cols.dtype
    c = [torch.randn(n, dtype=wide), torch.randn(n, k, dtype=wide), torch.randn(n, dtype=wide)]
    return c, torch.randn(n, dtype=wide)


@pytest.mark.parametrize("memory", [0, -1])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_gradients_are_the_definitions_times_any_factor(transform, memory):
    o = operands(131, 1507, 23, 3)
    o.y[:, 1] = o.y[:, 0]
    ours, true = leaves(o), leaves(o)
    c, square = coefficients(o)
    got = OPS.head_loss(*ours, *c, square, transform, "lse,picked,sum", memory, True, True, True, True)
    (0.3 * linear_loss(got, c, square)).backward()
    expected = truth(true, transform)
    (0.3 * linear_loss(expected, c, square)).backward()
    for a, b in zip(got[:3], expected[:3]):
        torch.testing.assert_close(a, b)
    for a, b in zip((ours.h, ours.w, ours.cols, ours.rows), (true.h, true.w, true.cols, true.rows)):
        torch.testing.assert_close(a.grad, torch.zeros_like(b) if b.grad is None else b.grad)


@pytest.mark.parametrize("sizes", RAGGED)
@pytest.mark.parametrize("memory", [0, -1, 1])
@pytest.mark.parametrize("labels", [0, 1])
def test_ragged_sizes_and_every_plan(sizes, memory, labels):
    o = operands(*sizes, labels, u=False)
    ours, true = leaves(o, "h w"), leaves(o, "h w")
    c, _ = coefficients(o)
    e = none(o.h)
    got = OPS.head_loss(*ours, c[0], c[1], e, e, "", "lse,picked", memory, True, True, False, False)
    ((got[0] * c[0]).sum() + (got[1] * c[1]).sum()).backward()
    expected = truth(true)
    ((expected.lse * c[0]).sum() + (expected.picked * c[1]).sum()).backward()
    torch.testing.assert_close(ours.h.grad, true.h.grad)
    torch.testing.assert_close(ours.w.grad, true.w.grad)


@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)])
def test_a_frozen_operand_costs_no_gradient(needs):
    o = operands(70, 507, 23, u=False)
    h, w = o.h.requires_grad_(needs[0]), o.w.requires_grad_(needs[1])
    c, e = torch.full((70,), 1 / 70, dtype=torch.float64), none(o.h)
    got = OPS.head_loss(*o, c, -c[:, None], e, e, "", "lse,picked", 0, *needs, False, False)
    assert [bool(x.numel()) for x in got[3:7]] == [*needs, False, False]
    if any(needs):
        ((got[0] - got[1][:, 0]) * c).sum().backward()
    assert (h.grad is not None, w.grad is not None) == needs
