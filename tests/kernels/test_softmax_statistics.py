"""Softmax statistics of rows: one pass gives what log_softmax subtracts. The kernel runs in Triton's interpreter."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton", reason="Triton is published for Linux only")
if torch.cuda.is_available():
    pytest.skip("kernels are compiled here, not interpreted: benchmarks/gpu_check.py", allow_module_level=True)

from fusedhead.kernels.triton_engine.rows import softmax_statistics as module
from fusedhead.kernels.triton_engine.rows.softmax_statistics import softmax_statistics

# numpy speaks up where a GPU stays silent (inf - inf, log of NaN)
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")


@pytest.fixture(autouse=True)
def few_lanes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROW_LANES", 16)
    monkeypatch.setattr(module, "ROW_DEPTH", 2)
    module._launch.cache_clear()


@pytest.mark.parametrize("scales", [(1.0,), (0.5, 1.0), (1 / 3, 2.0, 0.5)], ids=str)
@pytest.mark.parametrize("vocab", [5, 32, 64, 203])
@pytest.mark.parametrize("spread", [1.0, 200.0])
def test_log_softmax_is_what_is_left(scales: tuple[float, ...], vocab: int, spread: float) -> None:
    torch.manual_seed(0)
    z = (torch.randn(5, vocab + 3) * spread).bfloat16()[:, :vocab]  # rows farther apart than they are long
    z[1, 0] = -math.inf  # a masked class
    z[2, ::2] = -math.inf
    found = list(softmax_statistics(z, scales))
    assert len(found) == len(scales)
    for scale, (top, log_total) in zip(scales, found):
        assert top.shape == log_total.shape == (5, 1)
        got = z.float() * scale - top - log_total
        truth = (z.double() * scale).log_softmax(1)
        torch.testing.assert_close(got.double(), truth, atol=2e-6 * max(1.0, spread), rtol=2e-6)


@pytest.mark.parametrize("odd", [math.nan, math.inf])
@pytest.mark.parametrize("at", [0, 20, 40])
def test_a_row_that_is_not_finite_is_not_a_number(odd: float, at: int) -> None:
    z = torch.randn(3, 41).bfloat16()
    z[1, at] = odd
    ((_, log_total),) = softmax_statistics(z, [1.0])
    assert log_total.isnan().flatten().tolist() == [False, True, False]


def test_a_row_of_nothing_is_not_a_number() -> None:
    z = torch.full((2, 41), -math.inf).bfloat16()
    z[1, 40] = 3
    ((top, log_total),) = softmax_statistics(z, [1.0])
    assert log_total.isnan().flatten().tolist() == [True, False]
    assert (top[1].item(), log_total[1].item()) == (3.0, 0.0)


def test_no_rows() -> None:
    ((top, log_total),) = softmax_statistics(torch.empty(0, 9).bfloat16(), [1.0])
    assert top.shape == log_total.shape == (0, 1)
