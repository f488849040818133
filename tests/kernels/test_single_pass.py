"""The single pass: statistics and gradients of one sweep, against float64."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is published for Linux only")
if torch.cuda.is_available():
    pytest.skip("kernels are compiled here, not interpreted: benchmarks/gpu_check.py", allow_module_level=True)


from fusedhead.kernels.contract import STATS, Needs, RowStats, Windows
from fusedhead.kernels.triton_engine import engine
from fusedhead.kernels.triton_engine import windows as triton_operands
from fusedhead.kernels.triton_engine.launch import sweep
from tests.kernels.interpreted import ALL, EACH_STEP, F32, OPERANDS, STEPS, error, gradients, head, truth

# numpy speaks up where a GPU stays silent (log2 0, inf - inf)
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")


@pytest.mark.parametrize("transform", ["", "mulrow:0 mulcol:1 mul:0.5 addcol:0", "mul:0.2 tanh mul:5.0"])
@pytest.mark.parametrize("tokens", [64, 16])
def test_one_sweep_gives_statistics_and_gradients(transform, tokens):
    x = head(n=20, v=70, k=1, transform=transform, weighted=True)
    g = gradients(20, square=True, sum="tanh" not in transform)
    stats, grads = engine.head_loss(x, g, OPERANDS, Windows(tokens, 70, F32))
    true, d = truth(x, g)
    assert error(stats.lse, true.lse) < STEPS
    assert error(stats.picked, true.picked) < STEPS
    assert stats.sum is None or error(stats.sum, true.sum) < STEPS
    assert error(grads.h, d[0]) < STEPS
    assert error(grads.w, d[1]) < STEPS
    assert stats.tie == 0
    assert stats.tie.signbit()


@pytest.mark.parametrize("transform", ["", "addcol:0 mulrow:1", EACH_STEP])
@pytest.mark.parametrize("windows", [Windows(64, 70, F32), Windows(16, 32, F32), Windows(16, 70, F32)])
def test_logits_that_lie_in_memory_are_read(monkeypatch, transform, windows):
    for module in (engine, triton_operands, sweep):
        monkeypatch.setattr(module, "multiplied_by_cublas", lambda head: True)
    x = head(n=37, v=70, k=2, transform=transform, weighted=True)
    g = gradients(37, 2, sum=True, entropy=True)
    stats = engine.head_stats(x, frozenset(STATS), windows)
    true, d_true = truth(x, g)
    for name in ("lse", "picked", "sum", "entropy", "variance", "max"):
        assert error(getattr(stats, name), getattr(true, name)) < STEPS, name
    assert torch.equal(stats.argmax, true.argmax)
    got = engine.head_stats_backward(x, g, stats, ALL, windows)
    for name, a, b in zip(Needs._fields, got, d_true):
        assert error(a, b) < STEPS if b.any() else not a.any(), name
    errors = []  # of several heads: how the logits round is the product's matter, and luck for a single row of 37
    for seed in range(3):
        x = head(n=37, v=70, k=2, transform=transform, weighted=True, seed=seed)
        g = gradients(37, 2, seed=seed + 1, square=True)
        stats, grads = engine.head_loss(x, g, OPERANDS, windows)
        true, d_true = truth(x, g)
        assert error(stats.lse, true.lse) < STEPS
        assert error(stats.picked, true.picked) < STEPS
        errors.append((error(grads.h, d_true[0]), error(grads.w, d_true[1])))
    assert torch.tensor(errors).square().mean(0).sqrt().max() < STEPS


@pytest.mark.parametrize("transform", ["", "mulrow:0 mulcol:1 mul:0.5 addcol:0", "mul:0.2 tanh mul:5.0"])
@pytest.mark.parametrize("further", [0.0, -40.0, 60.0, 300.0, -torch.inf])
def test_columns_that_lie_elsewhere_take_part_by_their_lse(transform: str, further: float) -> None:
    x, g = head(n=37, v=70, k=1, transform=transform), gradients(37, square=True)
    lse = truth(x, g)[0].lse
    beyond, asked = lse + further, []

    def other_columns(tokens: slice, found: RowStats) -> torch.Tensor:
        asked.append(tokens)
        assert error(found.lse, lse[tokens]) < STEPS
        return beyond[tokens].to(torch.float32)

    stats, grads = engine.head_loss(x, g, OPERANDS, Windows(16, 70, F32), other_columns)
    whole = torch.logaddexp(lse, beyond)
    slope = (g.lse + 2 * g.square * whole) * torch.exp(lse - whole)
    _, d = truth(x, g._replace(lse=slope, square=None))
    assert [i.start for i in asked] == [0, 16, 32]
    assert error(stats.lse, lse) < STEPS  # of the columns here
    assert error(grads.h, d[0]) < 4 * STEPS  # a factor is as exact as the lse that comes from elsewhere
    assert error(grads.w, d[1]) < 4 * STEPS
