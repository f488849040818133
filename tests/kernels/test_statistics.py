"""head_stats gives what the definition gives, for every statistic, transform and ragged size."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from fusedhead.kernels.contract import DIFFERENTIABLE_STATS, STATISTICS, STATS, RowGrads, RowStats
from tests.lowering.heads import ALL, OPS, RAGGED, Operands, distance, leaves, operands, truth


@pytest.mark.parametrize("sizes", RAGGED)
@pytest.mark.parametrize("labels", [0, 1, 3])
def test_every_statistic_is_the_definition(sizes, labels):
    o = operands(*sizes, labels)
    results = dict(zip(STATS, OPS.head_stats(*o, "", ",".join(STATS), 0)))
    for name, got in results.items():
        if name != "lse_low":  # what rounding took off the lse
            torch.testing.assert_close(got, getattr(truth(o), name), msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("stats", [*ALL.split(","), "variance", "max,argmax", "picked,sum"])
def test_only_what_is_asked_for_has_elements(stats):
    o = operands(7, 50, 8)
    got = dict(zip(STATS, OPS.head_stats(*o, "", stats, 0)))
    read = {"lse": {"lse_low"}, "entropy": {"lse", "lse_low"}, "variance": {"lse", "lse_low", "entropy"}}
    asked = set(stats.split(",")) | read.get(stats, set())
    assert {name for name, x in got.items() if x.numel()} == asked
    for name in stats.split(","):
        torch.testing.assert_close(got[name], getattr(truth(o), name))


@pytest.mark.parametrize("stats", ["entropy", "variance"])
@pytest.mark.parametrize("spread", [0.01, 1.0, 30.0])
def test_a_moment_of_the_softmax_errs_no_more_than_eager_code(stats, spread):
    """The statistic, and the gradients through it."""
    ours_off, eager_off = 0.0, 0.0
    for seed in range(4):
        torch.manual_seed(seed)
        o = operands(64, 3007, 32, dtype=torch.float32, spread=spread)
        wide = Operands(*(x.double() if x.is_floating_point() else x for x in o))
        at, (got, plain, true) = STATS.index(stats), (leaves(x, "h w") for x in (o, o, wide))
        ours, eager, exact = (
            (result, *torch.autograd.grad(result.sum(), [x.h, x.w]))
            for result, x in (
                (OPS.head_stats(*got, "", stats, 0)[at], got),
                (getattr(truth(plain), stats), plain),
                (getattr(truth(true), stats), true),
            )
        )
        ours_off += sum(distance(a.detach(), c.detach()) for a, c in zip(ours, exact))
        eager_off += sum(distance(b.detach(), c.detach()) for b, c in zip(eager, exact))
    assert ours_off <= eager_off


def test_the_table_and_the_tuples_name_the_same_statistics():
    assert RowStats._fields == (*STATS, "tie")
    assert set(RowGrads._fields) == {*DIFFERENTIABLE_STATS, "square"}
    assert all(set(s.reads) <= set(STATS) for s in STATISTICS)


def test_a_transposed_weight_gives_the_same():
    o = operands(70, 507, 24)
    flipped = o._replace(w=o.w.t().contiguous().t())
    for a, b in zip(OPS.head_stats(*flipped, "", ALL, 0), OPS.head_stats(*o, "", ALL, 0)):
        torch.testing.assert_close(a, b)


def test_a_decision_is_taken_on_rounded_logits_with_the_first_index_on_ties(any_cpu):
    h, w = torch.ones(1, 1), torch.tensor([[1.0], [3.0], [3.001], [2.0]])
    y = torch.zeros(1, 0, dtype=torch.int64)
    e = torch.empty(0)
    _, _, _, _, top, at, *_ = OPS.head_stats(h, w, y, e, e, e, "round:bfloat16", "max,argmax", 0)
    assert (top.item(), at.item()) == (3.0, 1)
    _, _, _, _, top, at, *_ = OPS.head_stats(h, w, y, e, e, e, "", "max,argmax", 0)
    assert at.item() == 2


def test_a_decision_on_a_bias_is_taken_on_the_sum_as_linear_rounds_it(any_cpu):
    h, w, bias = (torch.randn(*shape).bfloat16() for shape in ((512, 8), (700, 8), (700,)))
    e, y = torch.empty(0), torch.zeros(512, 0, dtype=torch.int64)
    chain = "addcol:0 round:bfloat16"
    _, _, _, _, top, at, *_ = OPS.head_stats(h, w, y, bias.float()[None], e, e, chain, "max,argmax", 0)
    z = F.linear(h, w, bias)
    assert torch.equal(at, z.argmax(1))
    assert torch.equal(top, z.amax(1).float())


def test_the_first_index_wins_across_blocks():
    v = 5000
    o = Operands(
        torch.ones(3, 1),
        torch.zeros(v, 1),
        torch.zeros(3, 0, dtype=torch.int64),
        torch.empty(0),
        torch.empty(0),
        torch.empty(0),
    )
    o.w[4321] = o.w[600] = 1
    assert OPS.head_stats(*o, "", "argmax", -1)[5].tolist() == [600] * 3
    o.w[4000] = torch.nan
    assert OPS.head_stats(*o, "", "argmax", -1)[5].tolist() == [4000] * 3


def test_more_than_two_to_the_31_logits():
    """Labels and weighted sums need no sweep; sweeps index inside one block (lowering/test_plan.py bounds it)."""
    n, v = 66_000, 33_000
    h, w = torch.ones(n, 1), torch.linspace(-1, 1, v)[:, None]
    y = torch.tensor([[v - 1, 0]]).expand(n, 2)
    e = torch.empty(0)
    _, picked, total, *_ = OPS.head_stats(h, w, y, e, e, w[:, 0] ** 2, "", "picked,sum", 0)
    assert picked.unique().tolist() == [-1, 1]
    torch.testing.assert_close(total, (w.double() ** 3).sum().float().expand(n), atol=1e-3, rtol=0)
    with FakeTensorMode():
        h, w, y = torch.empty(n, 8), torch.empty(v, 8), torch.empty(n, 1, dtype=torch.int64)
        got = OPS.head_stats(h, w, y, torch.empty(0), torch.empty(0), torch.empty(0), "", "lse,picked", 0)
    shapes = {name: tuple(x.shape) for name, x in zip((*STATS, "product"), got)}
    assert shapes == {**dict.fromkeys(shapes, (0,)), "lse": (n,), "lse_low": (n,), "picked": (n, 1)}
