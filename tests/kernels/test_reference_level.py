"""Rows whose logits lie far from 0 and far apart: the reference level keeps their digits."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is published for Linux only")
if torch.cuda.is_available():
    pytest.skip("kernels are compiled here, not interpreted: benchmarks/gpu_check.py", allow_module_level=True)


from fusedhead.kernels.contract import Head, HeadGrads, Windows
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


@pytest.mark.parametrize(("dtype", "offset"), [(torch.float16, 3e5), (F32, 3e5), (F32, -1e7)])
def test_the_gradients_of_a_second_sweep_lose_no_more_to_an_offset_than_eager_code(dtype, offset):
    """Half a unit of such an lse is 1.5 % of every probability of the row: what was rounded off it is taken along."""
    x, g = head(dtype=dtype), gradients(20)._replace(lse=torch.ones(20), picked=-torch.ones(20, 1))
    far = x._replace(transform=parse(f"add:{offset}"))
    stats = engine.head_stats(far, frozenset({"lse", "picked"}), Windows(20, 70, F32))
    grads = engine.head_stats_backward(far, g, stats, OPERANDS, Windows(20, 70, F32))
    h, w = (t.clone().requires_grad_() for t in (x.h, x.w))
    loss = torch.nn.functional.cross_entropy((h @ w.t()).float() + offset, x.y[:, 0], reduction="sum")
    _, true = truth(x, g)
    for got, eager, exact in zip(grads, torch.autograd.grad(loss, (h, w)), true):
        assert error(got, exact) <= 1.5 * error(eager, exact)  # the luck of one draw


def logits_of_about(size: float) -> Head:
    """Half of the labels have the largest logit of their row."""
    x = head()
    x = x._replace(h=x.h * size)
    x.y[::2, 0] = (x.h @ x.w.t()).argmax(1)[::2]
    return x


def losses_of(x: Head, linear: bool) -> tuple[torch.Tensor, HeadGrads]:
    g, windows = gradients(20)._replace(lse=torch.ones(20), picked=-torch.ones(20, 1)), Windows(20, 70, F32)
    if linear:
        stats, grads = engine.head_loss(x, g, OPERANDS, windows)
    else:
        stats = engine.head_stats(x, frozenset({"lse", "picked"}), windows)
        grads = engine.head_stats_backward(x, g, stats, OPERANDS, windows)
    assert stats.picked is not None
    assert stats.lse_low is not None
    return (stats.lse - stats.picked[:, 0]) + stats.lse_low, grads


def eager_losses(x: Head, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    h, w = (t.to(dtype, copy=True).requires_grad_() for t in (x.h, x.w))
    each = torch.nn.functional.cross_entropy(h @ w.t(), x.y[:, 0], reduction="none")
    return each.detach(), *torch.autograd.grad(each.sum(), (h, w))


@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("power", [13, 28])
def test_large_logits_lose_what_two_numbers_of_an_lse_cannot_hold(power, linear):
    x = logits_of_about(2.0 ** (power - 3))  # the largest is about eight times that
    loss, grads = losses_of(x, linear)
    lost = 4 * 2.0 ** max(power - 48, -22)
    for got, eager, exact in zip((loss, *grads), eager_losses(x, F32), eager_losses(x, torch.float64)):
        assert got is not None
        assert error(got, exact) <= 1.5 * error(eager, exact) + lost
    assert float(loss[::2].min()) >= -(2.0 ** (power - 46)) - 1e-6


@pytest.mark.filterwarnings("ignore:(overflow|invalid|divide by zero):RuntimeWarning")
@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("size", [1e9, 1e37])
def test_a_loss_beyond_what_a_level_can_hold_is_right_or_not_finite(size, linear):
    x = logits_of_about(size)
    loss, _ = losses_of(x, linear)
    exact = eager_losses(x, torch.float64)[0]
    off = (loss.double() - exact).abs() / exact.abs().max()
    assert bool((~loss.isfinite() | (off < 1e-6)).all())
