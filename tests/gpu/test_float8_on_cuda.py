"""Gradients by float8 products on a GPU that has them: errors, order, what is said, and what keeps exact products."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fusedhead
from fusedhead.kernels import self_check
from fusedhead.kernels.chips import TESTED
from fusedhead.lowering.engines import engine_for

pytestmark = [
    pytest.mark.filterwarnings("ignore:The CUDA Graph is empty"),  # Inductor's own
    pytest.mark.skipif(
        torch.cuda.get_device_capability()[0] not in TESTED, reason="float8 gradients have kernels for Hopper alone"
    ),
]


@pytest.fixture(autouse=True, scope="module")
def _served():
    """These tests say themselves whether the kernels serve."""
    for name in ("pairs", "float8"):
        self_check.decide(name, torch.device("cuda", torch.cuda.current_device()), True)
    assert engine_for(torch.bfloat16, "cuda").float8_serves(None)


N, D, V = 2304, 2048, 32100
FLOAT8 = {"fusedhead.gradients": "float8", "fusedhead.strict": True}


def operands(seed: int = 0, n: int = N) -> tuple[Tensor, Tensor, Tensor]:
    """A head like a trained one: most rows are sure of their label, some labels are frequent."""
    draw = torch.Generator("cuda").manual_seed(seed)
    w = torch.randn(V, D, generator=draw, device="cuda") / D**0.5
    y = (torch.rand(n, generator=draw, device="cuda") ** 6 * V).long()
    h = (
        torch.randn(n, D, generator=draw, device="cuda") * 2
        + 8 * torch.rand(n, 1, generator=draw, device="cuda") * w[y]
    )
    y[::17] = -100
    return h.bfloat16().requires_grad_(), w.bfloat16().requires_grad_(), y


def loss_of(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(h @ w.t(), y)


def capped(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(20 * torch.tanh(h @ w.t() / 20), y)


def smoothed(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(h @ w.t(), y, label_smoothing=0.1)


def gradients(program: Any, *given: Tensor) -> tuple[Tensor, ...]:
    torch._dynamo.reset()
    loss = program(*given)
    return (loss.detach(), *torch.autograd.grad(loss, given[:2]))


def error(got: Tensor, true: Tensor) -> float:
    return ((got.double() - true).norm() / true.norm()).item()


def test_errors_are_no_more_than_eagers_and_every_run_gives_the_same():
    h, w, y = operands()
    program = torch.compile(loss_of, backend="fusedhead", options=FLOAT8)
    found = gradients(program, h, w, y)
    again = gradients(program, h, w, y)
    exact = gradients(torch.compile(loss_of, backend="fusedhead"), h, w, y)
    eager = gradients(loss_of, h, w, y)
    wide = [x.detach().double().requires_grad_() for x in (h, w)]
    true = gradients(loss_of, *wide, y)
    for name, a, b, c, d, e in zip(("loss", "dh", "dw"), found, again, exact, eager, true):
        assert torch.equal(a, b), name
        assert error(a, e) <= 1.0 * error(d, e), name
        assert name == "loss" or not torch.equal(a, c), name  # otherwise no product was float8


def test_the_report_says_which_products_are_float8_and_why_not():
    for program, word in (
        (loss_of, "float8 products"),
        (capped, "not h wᵀ alone"),
        (smoothed, "the sum over the logits"),
    ):
        torch._dynamo.reset()
        text = str(fusedhead.explain(program, options=FLOAT8)(*operands()))
        assert word in text, text


@pytest.mark.parametrize("program", [capped, smoothed])
def test_what_float8_does_not_serve_is_what_it_was(program):
    h, w, y = operands()
    found = gradients(torch.compile(program, backend="fusedhead", options=FLOAT8), h, w, y)
    exact = gradients(torch.compile(program, backend="fusedhead"), h, w, y)
    for a, b in zip(found, exact):
        assert torch.equal(a, b)


def test_a_broken_row_stays_alone():
    h, w, y = operands()
    with torch.no_grad():
        h[7] = float("nan")
    loss, dh, dw = gradients(torch.compile(loss_of, backend="fusedhead", options=FLOAT8), h, w, y)
    assert loss.isnan()
    assert dw.isnan().all()  # as eager's: every class has that row in its sum
    assert dh[7].isnan().all()
    assert dh[8:].isfinite().all()


def test_an_infinite_weight_reaches_its_column_of_dh_alone():
    h, w, y = operands()
    with torch.no_grad():
        h[:, 3] = h[:, 3].abs() + 0.1
        w[31999, 3] = float("-inf")  # a class that no token can have
        y[y == 31999] = 0
    _, dh, _ = gradients(torch.compile(loss_of, backend="fusedhead", options=FLOAT8), h, w, y)
    assert dh[y >= 0, 3].isnan().all()
    assert dh[:, :3].isfinite().all()


def test_no_step_waits_for_the_device():
    h, w, y = operands()
    program = torch.compile(loss_of, backend="fusedhead", options=FLOAT8)
    program(h, w, y).backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        program(h, w, y).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
