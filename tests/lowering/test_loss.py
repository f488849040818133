"""head_loss: statistics that stay differentiable, with gradients that the same sweep has computed."""

from __future__ import annotations

import pytest
import torch

from fusedhead.lowering.autograd import upstream_scale
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


def test_a_gradient_that_the_call_left_out_is_an_error_and_not_zero():
    o = operands(7, 50, 8, u=False)
    o.h.requires_grad_()
    c, e = torch.ones(7, dtype=torch.float64), none(o.h)
    got = OPS.head_loss(*o, c, -c[:, None], e, e, "", "lse,picked", 0, False, False, False, False)
    with pytest.raises(RuntimeError, match="need_h=False"):
        got[0].sum().backward()


def test_backward_twice_gives_the_same_and_a_second_derivative_is_refused():
    o = leaves(operands(7, 50, 8, u=False), "h w")
    c, e = torch.ones(7, dtype=torch.float64), none(o.h)
    got = OPS.head_loss(*o, c, -c[:, None], e, e, "", "lse,picked", 0, True, True, False, False)
    loss = (got[0] - got[1][:, 0]).sum()
    one = torch.autograd.grad(loss, o.h, retain_graph=True)
    two = torch.autograd.grad(loss, o.h, retain_graph=True)
    assert torch.equal(one[0], two[0])
    (dh,) = torch.autograd.grad(loss, o.h, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiated once"):
        dh.sum().backward()
    stats = OPS.head_stats(*o, "", "lse", 0)[0].sum()
    (dh,) = torch.autograd.grad(stats, o.h, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiated once"):
        dh.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_tie_is_minus_zero_and_what_flows_back_into_it_is_the_factor(dtype):
    o = leaves(operands(7, 50, 8, u=False, dtype=dtype), "h w")
    c, e = torch.ones(7, dtype=none(o.h).dtype), none(o.h)
    got = OPS.head_loss(*o, c, -c[:, None], e, e, "", "lse,picked", 0, True, True, False, False)
    dh, dw, tie = got[3], got[4], got[7]
    assert tie.shape == ()
    assert tie == 0
    assert tie.signbit()  # so that x + tie is x, zeros of either sign included
    got = torch.autograd.grad(tie, (o.h, o.w), torch.tensor(0.5, dtype=tie.dtype))
    assert torch.equal(got[0], dh * 0.5)
    assert torch.equal(got[1], dw * 0.5)


@pytest.mark.parametrize("size", [1e-300, 1e-20, 1.0, 1e20, 1e300])
def test_the_upstream_factor_survives_tiny_and_huge_coefficients(size):
    c = torch.randn(100, dtype=torch.float64) * size
    assert upstream_scale([(2.5 * c, c)]).item() == pytest.approx(2.5)


def test_the_upstream_factor_of_no_coefficients_is_zero():
    zero = torch.zeros(5)
    assert upstream_scale([(torch.ones(5), zero)]).item() == 0
    assert upstream_scale([(torch.ones(0), torch.ones(0))]).item() == 0


def test_a_factor_is_not_rounded_to_the_gradients_dtype(any_cpu):
    o = leaves(operands(64, 507, 23, dtype=torch.bfloat16, u=False), "h")
    c, e = torch.full((64,), 1 / 64), none(o.h)

    def gradient(factor):
        got = OPS.head_loss(*o, c, -c[:, None], e, e, "", "lse,picked", 0, True, False, False, False)
        return torch.autograd.grad(factor * ((got[0] - got[1][:, 0]) * c).sum(), o.h)[0].double()

    ratio = (gradient(1 / 3) / gradient(1.0)).nan_to_num(1 / 3)
    assert abs(ratio.mean().item() - 1 / 3) < 1e-4  # 1/3 itself is 5e-4 off in bfloat16
