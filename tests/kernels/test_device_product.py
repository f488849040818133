"""Operands of any layout are read where they lie. Kernels run in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is published for Linux only")
if torch.cuda.is_available():
    pytest.skip("kernels are compiled here, not interpreted: benchmarks/gpu_check.py", allow_module_level=True)


from fusedhead.kernels.contract import Windows
from fusedhead.kernels.triton_engine import engine
from tests.kernels.interpreted import F32, OPERANDS, STEPS, error, gradients, head, truth

# numpy speaks up where a GPU stays silent (log2 0, inf - inf)
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")


@pytest.mark.parametrize("dtype", [F32, torch.float16])
@pytest.mark.parametrize("d", [13, 24])
def test_a_weight_contiguous_along_the_vocabulary_is_read_in_place(dtype, d):
    x = head(d=d, dtype=dtype)
    x = x._replace(w=x.w.t().contiguous().t())
    g = gradients(20)
    stats, grads = engine.head_loss(x, g, OPERANDS, Windows(16, 70, F32))
    true, exact = truth(x, g)
    slack = STEPS if dtype == F32 else 1e-3
    assert error(stats.lse, true.lse) < STEPS
    assert error(grads.h, exact[0]) < slack
    assert error(grads.w, exact[1]) < slack
    assert grads.w.is_contiguous()


def test_strided_operands_are_read_in_place():
    x = head(d=16)
    h = torch.stack((x.h, torch.full_like(x.h, torch.nan)), 2)[:, :, 0]
    got = engine.head_stats(x._replace(h=h), frozenset({"lse"}), Windows(16, 70, F32))
    assert error(got.lse, truth(x, gradients(20))[0].lse) < STEPS
