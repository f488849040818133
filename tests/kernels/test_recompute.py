"""Recompute: the columns whose exponentials the single pass does not keep, against float64."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is published for Linux only")
if torch.cuda.is_available():
    pytest.skip("kernels are compiled here, not interpreted: benchmarks/gpu_check.py", allow_module_level=True)


from benchmarks.measure import cpu_allocations, peak_of
from fusedhead.kernels.contract import Head, Needs, Windows
from fusedhead.kernels.triton_engine import engine, single_pass
from fusedhead.kernels.triton_engine.sweeps import statistics
from tests.kernels.interpreted import F32, OPERANDS, STEPS, error, gradients, head, truth

# numpy speaks up where a GPU stays silent (log2 0, inf - inf)
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")


@pytest.mark.parametrize("transform", ["", "mulrow:0 mulcol:1 mul:0.5 addcol:0"])
@pytest.mark.parametrize("needs", [OPERANDS, Needs(True, False, False, False), Needs(False, True, False, False)])
@pytest.mark.parametrize(("k", "kept"), [(0, 128), (1, 128), (2, 128), (1, 80), (2, 144)])
def test_a_part_of_the_exponentials_may_be_kept(monkeypatch, transform, needs, k, kept):
    monkeypatch.setattr(single_pass, "PARTLY", (F32,))
    x, g = head(n=37, v=300, k=k, transform=transform), gradients(37, k, square=True)
    if k:
        x.y[:8, 0] = torch.arange(kept - 4, kept + 4)
    stats, grads = engine.head_loss(x, g, needs, Windows(16, kept, F32))
    true, d = truth(x, g)
    assert error(stats.lse, true.lse) < STEPS
    assert not k or error(stats.picked, true.picked) < STEPS
    for need, got, exact in zip(needs, grads, d):
        assert error(got, exact) < STEPS if need else got is None


def test_the_lse_of_columns_that_are_not_kept_may_take_several_launches(monkeypatch):
    monkeypatch.setattr(single_pass, "PARTLY", (F32,))
    monkeypatch.setattr(statistics, "LAUNCH_FLOP", 1)
    x, g = head(n=80, v=300, k=1), gradients(80, 1)
    stats, grads = engine.head_loss(x, g, OPERANDS, Windows(48, 128, F32))
    true, d = truth(x, g)
    assert error(stats.lse, true.lse) < STEPS
    assert error(stats.picked, true.picked) < STEPS
    assert error(grads.h, d[0]) < STEPS
    assert error(grads.w, d[1]) < STEPS


@pytest.mark.parametrize("linear", [True, False])
def test_blocks_hold_what_the_planner_says_however_many_windows_there_are(monkeypatch, linear):
    """A block of dz and half of the float32 dh of one window: not those of two windows."""
    monkeypatch.setattr(single_pass, "PARTLY", (torch.float16,))
    tokens, kept, d = 128, 16, 512
    x, g = head(n=3 * tokens, v=2 * kept, d=d, dtype=torch.float16), gradients(3 * tokens)
    stats = engine.head_stats(x, frozenset({"lse"}), Windows(tokens, kept, F32))
    windows = Windows(tokens, kept, torch.float16)

    def step():
        if linear:
            return engine.head_loss(x, g, OPERANDS, windows)[1]
        return engine.head_stats_backward(x, g, stats, OPERANDS, windows)

    grads, allocated = cpu_allocations(step)
    held = peak_of(allocated) - 2 * (grads.h.numel() + grads.w.numel())
    half_of_dh = 2 * tokens * d
    assert half_of_dh < held < 2 * half_of_dh - (16 << 10)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("label", [0, 127, 128, 299])
@pytest.mark.parametrize("reverse", [False, True])
def test_kept_and_other_columns_may_lie_300_apart(monkeypatch, label, reverse):
    monkeypatch.setattr(single_pass, "PARTLY", (F32,))
    x, g = head(n=20, v=300, transform="addcol:0"), gradients(20)
    x.cols[0] = torch.linspace(-150, 150, 300).flip(0) if reverse else torch.linspace(-150, 150, 300)
    x.y[:] = label
    stats, grads = engine.head_loss(x, g, OPERANDS, Windows(20, 128, F32))
    true, d = truth(x, g)
    assert error(stats.lse, true.lse) < STEPS
    assert error(grads.h, d[0]) < 1e-5
    assert error(grads.w, d[1]) < 1e-5


def test_an_infinite_logit_among_the_others_is_not_lost(monkeypatch):
    monkeypatch.setattr(single_pass, "PARTLY", (F32,))
    x, g = head(n=20, v=300, transform="addcol:0"), gradients(20)
    x.cols[0, 200] = torch.inf
    x.y.clamp_(max=100)
    stats, grads = engine.head_loss(x, g, OPERANDS, Windows(20, 128, F32))
    assert stats.lse.isposinf().all()
    assert grads.h.isnan().all()
    x.cols[0, 128:] = -torch.inf
    stats, grads = engine.head_loss(x, g, OPERANDS, Windows(20, 128, F32))
    kept = Head(x.h, x.w[:128], x.y, x.cols[:, :128], x.rows, x.u, x.transform)
    true, d = truth(kept, g)
    assert error(stats.lse, true.lse) < STEPS
    assert error(grads.h, d[0]) < STEPS
