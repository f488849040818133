"""The sweep of statistics against float64. Kernels run in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is published for Linux only")
if torch.cuda.is_available():
    pytest.skip("kernels are compiled here, not interpreted: benchmarks/gpu_check.py", allow_module_level=True)


from fusedhead.kernels.contract import STATS, Needs, RowGrads, RowStats, Windows
from fusedhead.kernels.triton_engine import engine, single_pass
from fusedhead.kernels.triton_engine.sweeps import statistics
from tests.kernels.interpreted import CURVED, EACH_STEP, F32, OPERANDS, STEPS, error, gradients, head, truth

# numpy speaks up where a GPU stays silent (log2 0, inf - inf)
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")


@pytest.mark.parametrize("transform", ["", "mul:0.5 addcol:1", EACH_STEP, CURVED])
def test_every_statistic_matches_float64(transform):
    x = head(n=37, v=101, d=24, k=2, transform=transform, weighted=True)
    got = engine.head_stats(x, frozenset(STATS), Windows(16, 32, F32))
    true, _ = truth(x, gradients(37, 2))
    for name in ("lse", "picked", "sum", "entropy", "variance", "max"):
        assert error(getattr(got, name), getattr(true, name)) < STEPS, name
    assert torch.equal(got.argmax, true.argmax)


@pytest.mark.parametrize("n", [1, 7, 16, 50])
@pytest.mark.parametrize("v", [1, 33, 64])
def test_every_size_is_covered(n, v):
    x = head(n=n, v=v)
    got = engine.head_stats(x, frozenset(STATS), Windows(n, v, F32))
    true, _ = truth(x, gradients(n))
    assert error(got.lse, true.lse) < STEPS
    assert error(got.picked, true.picked) < STEPS
    assert torch.equal(got.argmax, true.argmax)


@pytest.mark.parametrize("n", [32, 37, 96])
@pytest.mark.parametrize("transform", ["", "addrow:0 mulcol:1"])
def test_a_long_sweep_takes_several_launches(monkeypatch, transform, n):
    """One a group of token blocks: 2 blocks of 16 tokens on the CPU."""
    x, want = head(n=n, v=70, k=2, transform=transform, weighted=True), frozenset(STATS)
    once = engine.head_stats(x, want, Windows(n, 70, F32))
    monkeypatch.setattr(statistics, "LAUNCH_FLOP", 1)
    assert [at.start for at in statistics.launches(x, want)] == list(range(0, n, 32))
    for name, got, one in zip(RowStats._fields, engine.head_stats(x, want, Windows(n, 70, F32)), once):
        assert (got is one is None) or (got.shape == one.shape and error(got, one) < STEPS), name


def test_no_gradient_at_all_is_a_forward_sweep():
    x = head()
    stats, grads = engine.head_loss(x, gradients(20), Needs(False, False, False, False), Windows(16, 70, F32))
    assert grads == (None, None, None, None)
    assert error(stats.lse, truth(x, gradients(20))[0].lse) < STEPS


@pytest.mark.parametrize("k", [0, 3])
def test_any_number_of_labels_a_row(k):
    x = head(k=k)
    if k:
        x.y[:, 1] = x.y[:, 0]  # a label given twice counts twice
    g = gradients(20, k)
    stats, grads = engine.head_loss(x, g, OPERANDS, Windows(20, 70, F32))
    true, d = truth(x, g)
    assert stats.picked.shape == (20, k)
    assert torch.allclose(stats.picked.double(), true.picked, rtol=1e-6, atol=1e-6)
    assert error(grads.h, d[0]) < STEPS
    assert error(grads.w, d[1]) < STEPS


def test_argmax_is_taken_on_rounded_logits_with_the_first_index_on_ties():
    x = head(transform="mul:1.0 round:float16", scale=0.01)
    got = engine.head_stats(x, frozenset({"max", "argmax"}), Windows(20, 70, F32))
    rounded = (x.h @ x.w.T).half()
    tied = (rounded == rounded.amax(1, keepdim=True)).float()
    assert torch.equal(got.argmax, tied.argmax(1))
    assert torch.equal(got.max, rounded.amax(1).float())


def test_no_tokens_give_empty_statistics_and_zero_gradients():
    x = head(n=0)
    g = RowGrads(torch.empty(0), torch.empty(0, 1))
    stats, grads = engine.head_loss(x, g, OPERANDS, Windows(16, 70, F32))
    assert stats.lse.shape == (0,)
    assert grads.h.shape == (0, 16)
    assert not grads.w.any()


@pytest.mark.parametrize("at_once", [True, False])
def test_a_difference_from_the_lse_errs_no_more_than_eager_code_whatever_the_logits_share(at_once):
    ours, eager = 0.0, 0.0
    for seed in range(6):
        one = head(transform="addcol:0", seed=seed)
        one = one._replace(cols=one.cols[:1] + 1e4)
        c = torch.full((len(one.h),), 1 / len(one.h))
        if at_once:
            got = engine.head_loss(one, RowGrads(c, -c[:, None]), OPERANDS, Windows(16, 70, F32))[0]
        else:
            got = engine.head_stats(one, frozenset({"lse", "picked"}), Windows(20, 70, F32))
        z = torch.nn.functional.linear(one.h, one.w, one.cols[0])
        true = torch.nn.functional.linear(one.h.double(), one.w.double(), one.cols[0].double())
        labels = one.y[:, 0]
        losses = torch.nn.functional.cross_entropy(true, labels, reduction="none")
        ours += float(((got.lse - got.picked[:, 0] + got.lse_low) - losses).square().sum())
        eager += float((torch.nn.functional.cross_entropy(z, labels, reduction="none") - losses).square().sum())
    assert ours <= 1.05 * eager


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("offset", [0.0, 1e2, 1e4, 1e6])
def test_the_spread_errs_no_more_than_eager_code_whatever_all_logits_share(offset, weighted):
    errors = torch.zeros(3, dtype=torch.float64)
    for seed in range(6):
        x = head(n=18, v=150, k=1, transform="addcol:0", seed=seed, weighted=weighted)
        x.cols[0] += offset
        u = x.u if weighted else torch.ones(150)
        true = -((x.h.double() @ x.w.double().T + x.cols[0].double()).log_softmax(1) @ u.double())
        eager = -((x.h @ x.w.T + x.cols[0]).log_softmax(1) @ u)
        stats = engine.head_stats(x, frozenset({"lse", "sum", "spread"}), Windows(18, 150, F32))
        c = gradients(18, sum=True)
        assert single_pass.can_single_pass(engine.ready_head(x), c, OPERANDS, Windows(18, 150, F32))
        loss, _ = engine.head_loss(x, c, OPERANDS, Windows(18, 150, F32))
        for at, result in enumerate((eager, stats.spread, loss.spread)):
            errors[at] += (result.double() - true).square().sum()
    rounding = 2.0**-24 * float(true.norm()) * 6**0.5
    assert bool((errors[1:].sqrt() <= 1.05 * errors[0].sqrt() + rounding).all())
