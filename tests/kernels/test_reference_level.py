"""Rows whose logits lie far from 0 and far apart: the reference level keeps their digits."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is published for Linux only")
if torch.cuda.is_available():
    pytest.skip("kernels are compiled here, not interpreted: benchmarks/gpu_check.py", allow_module_level=True)


from fusedhead.kernels.contract import Head, Windows
from fusedhead.kernels.transform.transform import parse
from fusedhead.kernels.triton_engine import engine
from tests.kernels.interpreted import F32, OPERANDS, STEPS, error, gradients, head, truth

# numpy speaks up where a GPU stays silent (log2 0, inf - inf)
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_a_common_offset_costs_no_more_than_its_own_rounding(offset):
    x, g = head(transform=f"add:{offset}"), gradients(20)
    stats, grads = engine.head_loss(x, g, OPERANDS, Windows(20, 70, F32))
    plain, exact = engine.head_loss(x._replace(transform=parse("")), g, OPERANDS, Windows(20, 70, F32))
    assert float((stats.lse - offset - plain.lse).abs().max()) <= 2e-3  # two units in the last place of 1e4
    assert error(grads.h, exact.h) < 2e-3


def spread(worst_label: bool) -> Head:
    """Logits of a row span 300 around 0 (bias), the label on the least or the most likely column."""
    x = head(transform="addcol:0", d=16)
    x.cols[0] = torch.linspace(-150, 150, 70)
    x.y[:] = 0 if worst_label else 69
    x.y[::3] = 35
    return x


@pytest.mark.parametrize("worst_label", [True, False])
def test_rows_that_span_300_are_right_whatever_the_label(worst_label):
    x, g = spread(worst_label), gradients(20)
    stats, grads = engine.head_loss(x, g, OPERANDS, Windows(20, 70, F32))
    true, d = truth(x, g)
    assert error(stats.lse, true.lse) < STEPS
    assert error(grads.h, d[0]) < 1e-5  # logits of 150 are rounded to 1e-5
    assert error(grads.w, d[1]) < 1e-5


def test_only_the_token_blocks_that_need_it_are_redone():
    x, g = head(n=50, transform="addcol:0"), gradients(50)
    x.cols[0] = torch.linspace(-150, 150, 70)
    x.y[:] = 69
    x.y[20] = 0  # one row of the second block
    stats, grads = engine.head_loss(x, g, OPERANDS, Windows(50, 70, F32))
    true, d = truth(x, g)
    assert error(stats.lse, true.lse) < STEPS
    assert error(grads.h, d[0]) < 1e-5
