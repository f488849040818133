"""Heads that an op builds whole, their logits being few: the windows' results, in as few calls as eager code makes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fusedhead.kernels.contract import Needs
from fusedhead.lowering import ops
from fusedhead.lowering.plan.plan import plan
from fusedhead.lowering.plan.problem import Problem
from fusedhead.rules.pointwise_codegen import function_of
from tests.lowering.heads import ALL, OPS, distance, eager_losses, leaves, none, operands, truth
from tests.lowering.test_loss import TRANSFORMS, coefficients, linear_loss

WHOLE = 1 << 40
GELU = function_of(torch.ops.aten.gelu.default, ("z",), (), 0).text


class Calls(TorchDispatchMode):
    """The calls that reach ATen inside the ops."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("transform", [*TRANSFORMS, f"addcol:0 fn:{GELU}", "dropcol:0 addrow:0"])
@pytest.mark.parametrize("weighted", [True, False])
def test_a_loss_is_the_definitions(transform, weighted):
    o = operands(31, 57, 13, 3, u=weighted)
    if "dropcol" in transform:
        o.cols[0, 5:] = 0  # five classes are dropped
    o.y[:, 1] = o.y[:, 0]
    ours, true = leaves(o), leaves(o)
    c, square = coefficients(o)
    got = OPS.head_loss(*ours, *c, square, transform, "lse,picked,sum", 0, True, True, True, True, WHOLE)
    if "dropcol" in transform:
        c[1] = torch.where(o.cols[0][o.y] != 0, 0, c[1])
        got = OPS.head_loss(*ours, c[0], c[1], none(o.h), square, transform, "lse,picked", 0, *(True,) * 4, WHOLE)
        expected = truth(true, transform)
        for lse, picked in (got[:2], expected[:2]):
            (lse * c[0] + lse**2 * square + (picked * c[1]).nan_to_num(0, 0, 0).sum(1)).sum().backward()
    else:
        (0.3 * linear_loss(got, c, square)).backward()
        expected = truth(true, transform)
        (0.3 * linear_loss(expected, c, square)).backward()
        torch.testing.assert_close(got[2], expected.sum)
    torch.testing.assert_close(got[0], expected.lse)
    torch.testing.assert_close(got[1], expected.picked)
    for a, b in zip((ours.h, ours.w, ours.cols, ours.rows), (true.h, true.w, true.cols, true.rows)):
        torch.testing.assert_close(a.grad, torch.zeros_like(b) if b.grad is None else b.grad)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_statistics_and_any_upstream_are_the_definitions(transform):
    o = operands(31, 57, 13, 2)
    ours, true = leaves(o), leaves(o)
    got, expected = OPS.head_stats(*ours, transform, ALL, 0, WHOLE), truth(true, transform)
    weights = [torch.randn_like(x) for x in got[:4]]
    sum((x * w).sum() for x, w in zip(got[:4], weights)).backward()
    sum((x * w).sum() for x, w in zip(expected[:4], weights)).backward()
    for a, b in zip(got[:6], expected[:6]):
        torch.testing.assert_close(a, b)
    for a, b in zip((ours.h, ours.w, ours.cols, ours.rows), (true.h, true.w, true.cols, true.rows)):
        torch.testing.assert_close(a.grad, torch.zeros_like(b) if b.grad is None else b.grad)


@pytest.mark.parametrize("sizes", [(0, 57, 13), (1, 57, 13), (5, 1, 3)])
def test_sizes_at_the_ends(sizes):
    o = leaves(operands(*sizes, u=False), "h w")
    c, e = torch.randn(sizes[0], dtype=torch.float64), none(o.h)
    got = OPS.head_loss(*o, c, -c[:, None], e, e, "", "lse,picked", 0, True, True, False, False, WHOLE)
    plain = OPS.head_loss(*o, c, -c[:, None], e, e, "", "lse,picked", 0, True, True, False, False)
    for a, b in zip(got, plain):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("row", [torch.inf, -torch.inf, torch.nan])
def test_a_broken_row_is_what_the_windows_make_of_it(row):
    o = operands(6, 57, 1, u=False)
    o.w[:] = o.w.abs() + 0.1
    o.h[2] = row
    c, e = torch.ones(6, dtype=torch.float64), none(o.h)
    inputs = (*o, c, -c[:, None], e, e, "", "lse,picked", 0, True, True, False, False)
    for a, b in zip(OPS.head_loss(*inputs, WHOLE), OPS.head_loss(*inputs)):
        torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_errors_are_no_larger_than_those_of_eager_code(dtype):
    ours, eager = [], []
    for _ in range(8):
        o = operands(64, 1024, 96, dtype=dtype, spread=3.0, u=False)
        n = len(o.h)
        wide = [x.double().requires_grad_() for x in o[:2]]
        true = torch.autograd.grad(F.cross_entropy(wide[0] @ wide[1].T, o.y[:, 0]), wide)
        mine = [x.clone().requires_grad_() for x in o[:2]]
        plain = torch.autograd.grad(eager_losses(*mine, o.y).mean(), mine)
        c, e = torch.full((n,), 1 / n), none(o.h)
        got = OPS.head_loss(*o, c, -c[:, None], e, e, "", "lse,picked", 0, True, True, False, False, WHOLE)
        ours.append([distance(a, b) for a, b in zip(got[3:5], true)])
        eager.append([distance(a, b) for a, b in zip(plain, true)])
    for mine, theirs in zip(torch.tensor(ours).mean(0), torch.tensor(eager).mean(0)):
        assert mine <= 1.02 * theirs


def test_a_step_takes_about_as_many_calls_as_the_plain_program():
    o = operands(64, 256, 16, dtype=torch.float32, u=False)
    c, e = torch.full((64,), 1 / 64), none(o.h)
    o = o._replace(cols=e, rows=e)
    inputs = (*o, c, -c[:, None], e, e, "", "lse,picked", 0, True, True, False, False)
    counts = []
    for whole_below in (WHOLE, 0):
        with Calls() as calls:
            ops._head_loss(*inputs, whole_below)
        counts.append(len(calls.names))
    assert counts[0] <= 33  # five of them for the second number of the lse
    assert counts[1] > 4 * counts[0]


def test_the_limit_decides_at_run_time_whatever_the_budget():
    needs = Needs(True, True, False, False)
    for memory in (0, -1, 64):
        for tokens, name in ((15, "torch whole"), (16, "torch windows")):
            head = Problem(tokens, 64, 8, torch.float32, "cpu", torch.float32, needs)
            assert plan(head, memory=memory, whole_below=1024).engine.name == name
    held = plan(Problem(15, 64, 8, torch.float32, "cpu", torch.float32, needs), whole_below=1024).predicted_bytes
    assert 15 * 64 * 4 <= held <= 4 * 15 * 64 * 4


@pytest.mark.parametrize("tokens", [1, 2, 5, 15, 16, 40])
@pytest.mark.parametrize("transform", ["", "mul:0.5 addcol:0 tanh mul:3.0"])
def test_a_kept_product_changes_no_digit_and_spares_one(tokens, transform, monkeypatch):
    o, mm = operands(tokens, 64, 2), torch.mm
    products, result = [], []
    monkeypatch.setattr(torch, "mm", lambda *a, **b: products.append(0) or mm(*a, **b))
    for keep in (False, True):
        ours = leaves(o)
        products.clear()
        got = OPS.head_stats(*ours, transform, "lse,picked,sum", 0, 16 * 64, keep)
        (got[0] ** 2 + got[1].sum(1) * got[2]).sum().backward()
        assert len(got[-1]) == (0 if not keep else max(2, tokens) if tokens < 16 else 2)
        result.append([*got[:3], *(x.grad for x in (ours.h, ours.w, ours.cols, ours.rows) if x.grad is not None)])
    for a, b in zip(*result):
        torch.testing.assert_close(a, b)
    assert tokens >= 16 or len(products) == 3
