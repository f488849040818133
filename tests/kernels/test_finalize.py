"""Rows and classes that are infinite, masked or undefined stay alone. Kernels run in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is published for Linux only")
if torch.cuda.is_available():
    pytest.skip("kernels are compiled here, not interpreted: benchmarks/gpu_check.py", allow_module_level=True)


from fusedhead.kernels.contract import STATS, Head, Needs, Windows
from fusedhead.kernels.triton_engine import engine
from tests.kernels.interpreted import F32, OPERANDS, STEPS, error, gradients, head, truth

# numpy speaks up where a GPU stays silent (log2 0, inf - inf)
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")


def test_masked_columns_take_no_part():
    x, g = head(transform="addcol:0"), gradients(20)
    x.cols[0] = 0
    x.cols[0, 40:] = -torch.inf
    x.y.clamp_(max=39)
    kept = Head(x.h, x.w[:40], x.y, x.cols[:, :40], x.rows, x.u, x.transform)
    stats, grads = engine.head_loss(x, g, OPERANDS, Windows(20, 70, F32))
    true, d = truth(kept, g)
    assert error(stats.lse, true.lse) < STEPS
    assert error(grads.h, d[0]) < STEPS
    assert not grads.w[40:].any()


def test_a_masked_target_leaves_the_others_gradients_right():
    x, g = head(transform="addcol:0"), gradients(20)
    x.cols[0] = 0
    x.cols[0, 40:] = -torch.inf
    x.y[:] = 50
    x.y[::3] = 7
    stats, grads = engine.head_loss(x, g, OPERANDS, Windows(20, 70, F32))
    true, d = truth(x, g)
    assert torch.equal(stats.picked.isneginf(), x.y == 50)
    assert error(stats.lse, true.lse) < STEPS
    assert error(grads.h, d[0]) < STEPS
    assert error(grads.w, d[1]) < STEPS


def test_a_row_that_is_not_finite_stays_alone():
    x = head()
    x.h[2], x.h[5] = torch.nan, torch.inf
    got = engine.head_stats(x, frozenset(STATS), Windows(20, 70, F32))
    fine = torch.ones(20, dtype=torch.bool)
    fine[[2, 5]] = False
    true, _ = truth(x, gradients(20))
    assert torch.equal(got.lse.isfinite(), fine)
    assert got.lse[2].isnan()
    assert got.max[2].isnan()
    assert error(got.lse[fine], true.lse[fine]) < STEPS


@pytest.mark.parametrize("dtype", [F32, torch.float16])
@pytest.mark.parametrize("tokens", [20, 8])  # one sweep, or two for so few
def test_a_row_with_infinite_logits_has_no_gradient_and_others_have_theirs(tokens, dtype):
    x, g = head(n=tokens, transform="addrow:0 addcol:1", dtype=dtype), gradients(tokens)
    x.cols[1] = 0
    x.rows[0, [2, 5]] = torch.tensor([torch.inf, -torch.inf])
    stats, grads = engine.head_loss(x, g, Needs(True, False, False, False), Windows(tokens, 70, dtype))
    fine = torch.ones(tokens, dtype=torch.bool)
    fine[[2, 5]] = False
    _, d = truth(x, g)
    assert stats.lse[~fine].tolist() == [torch.inf, -torch.inf]
    assert grads.h[~fine].isnan().all()
    assert error(grads.h[fine], d[0][fine]) < (STEPS if dtype == F32 else 2e-3)
    x.rows.zero_()
    x.cols[1, 3] = torch.inf
    _, grads = engine.head_loss(x, g, OPERANDS, Windows(tokens, 70, dtype))
    assert grads.w.isnan().all()
