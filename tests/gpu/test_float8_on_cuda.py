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
from fusedhead.kernels.contract import Head, RowGrads
from fusedhead.kernels.transform.transform import Transform
from fusedhead.kernels.triton_engine.float8.single_pass import one_float8_pass
from fusedhead.lowering.engines import engine_for
from fusedhead.lowering.plan.float8 import float8_candidates
from fusedhead.lowering.plan.problem import Problem

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
EXACT = {"fusedhead.strict": True}  # a divergence of so few logits is left to Inductor without it
FLOAT8 = EXACT | {"fusedhead.gradients": "float8"}


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


def z_loss(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    logits = h @ w.t()
    return F.cross_entropy(logits, y) + 1e-4 * logits.float().logsumexp(-1).square().mean()


def class_weights(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(h @ w.t(), y, weight=torch.linspace(0.5, 2, V, device="cuda", dtype=h.dtype))


def summed(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(h @ w.t(), y, reduction="sum") / 7


def capped(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(20 * torch.tanh(h @ w.t() / 20), y)


def scaled(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(h @ w.t() * 0.7, y)


def biased(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(h @ w.t() + torch.linspace(-1, 1, V, device="cuda", dtype=h.dtype), y)


def masked(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy((h @ w.t()).masked_fill(torch.arange(V, device="cuda") > V - 30, float("-inf")), y)


def smoothed(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(h @ w.t(), y, label_smoothing=0.1)


def per_token(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return (F.cross_entropy(h @ w.t(), y, reduction="none").square()).mean()


def divergence(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    teacher = (h.detach() @ w.detach().flip(0).t()).float().softmax(-1)
    return F.kl_div((h @ w.t()).float().log_softmax(-1), teacher, reduction="batchmean")


SERVED = (loss_of, z_loss, class_weights, summed)
NOT_SERVED = (  # and a word of the reason
    (capped, "not h wᵀ alone"),
    (scaled, "not h wᵀ alone"),
    (biased, "not h wᵀ alone"),
    (masked, "not h wᵀ alone"),
    (smoothed, "the sum over the logits"),
    (per_token, "not computed in the forward sweep"),
    (divergence, "dH and dW exact"),
)


def gradients(program: Any, *given: Tensor) -> tuple[Tensor, ...]:
    torch._dynamo.reset()
    loss = program(*given)
    return (loss.detach(), *torch.autograd.grad(loss, given[:2]))


def error(got: Tensor, true: Tensor) -> float:
    return ((got.double() - true).norm() / true.norm()).item()


@pytest.mark.parametrize("program", SERVED)
def test_errors_are_no_more_than_eagers_and_every_run_gives_the_same(program):
    h, w, y = operands()
    compiled = torch.compile(program, backend="fusedhead", options=FLOAT8)
    found = gradients(compiled, h, w, y)
    again = gradients(compiled, h, w, y)
    exact = gradients(torch.compile(program, backend="fusedhead"), h, w, y)
    eager = gradients(program, h, w, y)
    wide = [x.detach().double().requires_grad_() for x in (h, w)]
    true = gradients(program, *wide, y)
    for name, a, b, c, d, e in zip(("loss", "dh", "dw"), found, again, exact, eager, true):
        assert torch.equal(a, b), name
        assert error(a, e) <= 1.0 * error(d, e), name
        assert name == "loss" or not torch.equal(a, c), name  # otherwise no product was float8
    torch._dynamo.reset()
    assert "float8 products" in str(fusedhead.explain(program, options=FLOAT8)(h, w, y))


@pytest.mark.parametrize(("program", "word"), NOT_SERVED)
def test_what_float8_does_not_serve_is_what_it_was_with_a_sentence(program, word):
    h, w, y = operands()
    found = gradients(torch.compile(program, backend="fusedhead", options=FLOAT8), h, w, y)
    exact = gradients(torch.compile(program, backend="fusedhead", options=EXACT), h, w, y)
    # NOTES, "Token programs": dh of two compilations has other bits on an H200, with equal losses
    if program is divergence:
        wide = [x.detach().double().requires_grad_() for x in (h, w)]
        for a, b, e in zip(found, exact, gradients(program, *wide, y)):
            assert abs(error(a, e) - error(b, e)) <= 0.05 * error(b, e)
    else:
        assert all(map(torch.equal, found, exact))
    torch._dynamo.reset()
    text = str(fusedhead.explain(program, options=FLOAT8)(h, w, y))
    assert word in text, text


@pytest.mark.parametrize("given", ["float16", "float32", "few tokens", "frozen", "along the classes"])
def test_operands_that_float8_does_not_take_keep_exact_products(given):
    h, w, y = operands(n=512 if given == "few tokens" else N)
    if given.startswith("float"):
        h, w = (x.detach().to(getattr(torch, given)).requires_grad_() for x in (h, w))
    if given == "frozen":
        w = w.detach()
    if given == "along the classes":
        w = w.detach().t().contiguous().t().requires_grad_()
    wanted = [x for x in (h, w) if x.requires_grad]
    found = []
    for options in (FLOAT8, EXACT):
        torch._dynamo.reset()
        loss = torch.compile(loss_of, backend="fusedhead", options=options)(h, w, y)
        found.append((loss.detach(), *torch.autograd.grad(loss, wanted)))
    for a, b in zip(*found):
        assert torch.equal(a, b)
    torch._dynamo.reset()
    assert "dH and dW exact" in str(fusedhead.explain(loss_of, options=FLOAT8)(h, w, y))


@pytest.mark.parametrize(("n", "d", "v"), [(4096, 2048, 32000), (8192, 4096, 50304)])
@pytest.mark.parametrize("windows", [1, 2])
def test_the_workspace_is_what_the_plan_says_it_holds(n, d, v, windows):
    problem = Problem(n, v, d, torch.bfloat16, "cuda", torch.bfloat16, float8=True)
    way = next(way for way in float8_candidates(problem, 0) if -(-n // way.windows.tokens) == windows)
    h, w = (torch.randn(m, d, device="cuda", dtype=torch.bfloat16) for m in (n, v))
    nothing, c = torch.empty(0, device="cuda"), torch.full((n,), 1 / n, device="cuda")
    y = torch.randint(0, v, (n, 1), device="cuda")
    head = Head(h, w / d**0.5, y, nothing[None], nothing[None], nothing, Transform())
    del w
    one_float8_pass(head, RowGrads(c, -c[:, None]), way.windows)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    _, grads = one_float8_pass(head, RowGrads(c, -c[:, None]), way.windows)
    held = torch.cuda.max_memory_allocated() - before - grads.h.nbytes - grads.w.nbytes
    assert 0.8 * way.workspace_bytes < held <= 1.02 * way.workspace_bytes


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
