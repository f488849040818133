"""Gradients through the ops: one factor scales them all, and a second differentiation is refused."""

from __future__ import annotations

import pytest
import torch

from fusedhead.lowering.autograd import upstream_scale
from tests.lowering.heads import OPS, leaves, none, operands


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
