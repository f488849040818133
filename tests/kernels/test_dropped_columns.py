"""Classes set to -inf (the step `dropcol`) inside the kernels, against float64. Kernels run in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is published for Linux only")
if torch.cuda.is_available():
    pytest.skip("kernels are compiled here, not interpreted: benchmarks/gpu_check.py", allow_module_level=True)


from fusedhead.kernels.contract import Head, Needs, Windows
from fusedhead.kernels.triton_engine import engine, single_pass
from tests.kernels.interpreted import F32, OPERANDS, STEPS, error, gradients, head, truth

# numpy speaks up where a GPU stays silent (log2 0, inf - inf)
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")


def dropping(transform: str, **more) -> Head:
    """A third of the columns is dropped, and every third token has its label there."""
    x = head(n=37, transform=transform, **more)
    x.cols[0] = (torch.arange(70) % 3 == 1).float()
    x.cols[1].abs_()
    x.y[:] = x.y // 3 * 3 % 69
    x.y[::3] += 1
    return x


DROPPING = ("dropcol:0", "mul:0.2 tanh mul:5.0 dropcol:0", "dropcol:0 mul:0.2 tanh mul:5.0", "dropcol:0 mulcol:1")


@pytest.mark.parametrize("transform", DROPPING)
@pytest.mark.parametrize(("k", "tokens", "kept"), [(1, 40, 70), (2, 16, 40)])
def test_dropped_columns_take_nothing_and_give_labels_no_gradient(monkeypatch, transform, k, tokens, kept):
    monkeypatch.setattr(single_pass, "PARTLY", (F32,))
    x, g = dropping(transform, k=k), gradients(37, k, square=True)
    stats, grads = engine.head_loss(x, g, OPERANDS, Windows(tokens, kept, F32))
    true, d = truth(x, g)
    assert error(stats.lse, true.lse) < STEPS
    torch.testing.assert_close(stats.picked.double(), true.picked, rtol=STEPS, atol=STEPS)
    assert error(grads.h, d[0]) < STEPS
    assert error(grads.w, d[1]) < STEPS
    assert not grads.w[1::3].any()
    saved = engine.head_stats(x, frozenset({"lse"}), Windows(tokens, kept, F32))
    again = engine.head_stats_backward(x, g, saved, OPERANDS, Windows(tokens, kept, F32))
    assert error(again.h, d[0]) < STEPS
    assert error(again.w, d[1]) < STEPS


@pytest.mark.parametrize("transform", ["dropcol:0", "tanh dropcol:0"])
def test_whatever_a_dropped_logit_was_is_forgotten(transform):
    x, g, windows, frozen_h = dropping(transform), gradients(37), Windows(40, 70, F32), Needs(False, True, False, False)
    x.y[:] = 3
    fine, d = engine.head_loss(x, g, frozen_h, windows)
    x.w[1], x.w[4], x.w[7] = torch.nan, torch.inf, -torch.inf
    stats, grads = engine.head_loss(x, g, frozen_h, windows)
    swept = engine.head_stats(x, frozenset({"lse", "max"}), windows)
    assert torch.equal(stats.lse, fine.lse)
    assert torch.equal(grads.w, d.w)
    assert error(swept.lse, fine.lse) < STEPS
    assert swept.max.isfinite().all()


def test_a_sum_over_dropped_columns_is_infinite_and_its_gradient_is_not():
    x, g = dropping("mulcol:1 dropcol:0", weighted=True), gradients(37, sum=True)
    stats, grads = engine.head_loss(x, g, OPERANDS, Windows(16, 70, F32))
    _, d = truth(x, g)
    assert stats.sum.isneginf().all()
    assert error(grads.h, d[0]) < STEPS
    assert error(grads.w, d[1]) < STEPS


@pytest.mark.parametrize("tokens", [37, 8])  # one sweep, or two for so few
@pytest.mark.parametrize("transform", ["dropcol:0", "tanh dropcol:0"])
def test_where_no_column_is_left_nothing_flows_back(transform, tokens):
    x = dropping(transform)
    x = x._replace(h=x.h[:tokens], y=x.y[:tokens])
    x.cols[0] = 1
    stats, grads = engine.head_loss(x, gradients(tokens), OPERANDS, Windows(tokens, 70, F32))
    assert stats.lse.isneginf().all()
    assert not grads.h.any()
    assert not grads.w.any()
