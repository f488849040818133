"""NaN, infinities, errors and modes: as eager code, or in a sentence that names the operand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from tests.lowering.heads import OPS, leaves, none, operands, truth


def gradients(o, memory=0):
    """(lse, picked, dh, dw) of the mean cross-entropy, by the op and by the definition."""
    c = torch.full((len(o.h),), 1 / len(o.h), dtype=o.cols.dtype)
    e = none(o.h)
    got = OPS.head_loss(*o, c, -c[:, None], e, e, "", "lse,picked", memory, True, True, False, False)
    h, w = o.h.clone().requires_grad_(), o.w.clone().requires_grad_()
    z = h @ w.T
    grads = torch.autograd.grad(F.cross_entropy(z, o.y[:, 0]), (h, w))
    return (got[0], got[1], got[3], got[4]), (z.logsumexp(1), z.gather(1, o.y), *grads)


def same(got, true, **tolerance):
    for a, b in zip(got, true):
        torch.testing.assert_close(a, b.detach(), equal_nan=True, **tolerance)


@pytest.mark.parametrize("memory", [0, -1])
def test_a_row_of_nan_is_nan_and_leaves_other_rows_alone(memory):
    o = operands(9, 600, 8, u=False)
    o.h[4, 2] = torch.nan
    got, true = gradients(o, memory)
    same(got, true)
    assert got[0].isnan().sum() == 1


def test_infinite_logits_are_as_logsumexp_has_them():
    o = operands(9, 600, 1, u=False)
    o.h.abs_()
    o.w[17], o.w[599] = -math.inf, math.inf
    lse, *_ = OPS.head_stats(*o, "", "lse", 0)
    assert bool((lse == math.inf).all())
    o.w[599] = -math.inf
    torch.testing.assert_close(OPS.head_stats(*o, "", "lse", 0)[0], truth(o).lse)
    o.w.fill_(-math.inf)
    assert bool((OPS.head_stats(*o, "", "lse", 0)[0] == -math.inf).all())


@pytest.mark.parametrize("memory", [0, -1])
def test_a_masked_tail_of_the_vocabulary_gets_no_probability_and_no_gradient(memory):
    o = operands(130, 900, 8, u=False)
    o.cols[0] = 0
    o.cols[0, 800:] = -math.inf
    o = o._replace(y=o.y.clamp(max=799))
    c, e = torch.full((130,), 1 / 130, dtype=torch.float64), none(o.h)
    got = OPS.head_loss(*o, c, -c[:, None], e, e, "addcol:0", "lse,picked", memory, True, True, False, False)
    short = o._replace(w=o.w[:800], cols=o.cols[:, :800])
    expected = OPS.head_loss(*short, c, -c[:, None], e, e, "", "lse,picked", 0, True, True, False, False)
    same((got[0], got[1], got[3], got[4][:800]), (expected[0], expected[1], expected[3], expected[4]))
    assert not bool(got[4][800:].any())


@pytest.mark.parametrize("offset", [1e4, -1e4])
@pytest.mark.parametrize("memory", [0, -1])
def test_a_common_offset_changes_nothing(offset, memory):
    o = operands(70, 507, 23, u=False)
    o.h[:, 0], o.w[:, 0] = 100.0, offset / 100.0
    got, true = gradients(o, memory)
    same(got, true, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("memory", [0, -1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rows_spanning_three_hundred_and_hidden_peaks_overflow_nothing(memory, dtype):
    o = operands(70, 5007, 23, dtype=dtype, u=False)
    o.h.mul_(40.0)
    o.h[:35] = 0.5 * o.w[4999] * 200 / o.w[4999].norm() ** 2 * 3  # one column far above all that a sample sees
    tolerance = {"rtol": 1e-9, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 2e-3, "atol": 2e-5}
    got, true = gradients(o, memory)
    same(got, true, **tolerance)


def test_a_certain_target_keeps_the_relative_precision_of_its_gradient():
    h, w = torch.eye(4), 18.0 * torch.eye(4)
    y = torch.arange(4)[:, None]
    c, e = torch.ones(4), torch.empty(0)
    _, _, _, dh, *_ = OPS.head_loss(
        h, w, y, e, e, e, c, -c[:, None], e, e, "", "lse,picked", 0, True, True, False, False
    )
    p = (w.double() - 18).exp() / (1 + 3 * math.exp(-18))
    true = (p - torch.eye(4, dtype=torch.float64) * (p.diagonal() + 3 * p[0, 1])) @ w.double()
    assert float(((dh - true) / true).abs().max()) < 1e-6


def test_autocast_around_an_op_does_not_reach_into_it():
    o = operands(7, 507, 23, dtype=torch.float32)
    plain = OPS.head_stats(*o, "", "lse,entropy,argmax", 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = OPS.head_stats(*o, "", "lse,entropy,argmax", 0)
    assert all(torch.equal(a, b) for a, b in zip(plain, inside))


def test_no_grad_and_inference_mode_give_the_same_numbers():
    o = leaves(operands(7, 507, 23, dtype=torch.float32))
    plain = OPS.head_stats(*o, "", "lse,picked", 0)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            quiet = OPS.head_stats(*o, "", "lse,picked", 0)
        assert not quiet[0].requires_grad
        assert all(torch.equal(a, b) for a, b in zip(plain[:2], quiet[:2]))
