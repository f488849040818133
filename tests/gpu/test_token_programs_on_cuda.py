"""Token programs on one GPU: errors against float64 over windows and groups, and the kernel of their row statistics."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fusedhead
from benchmarks import programs
from fusedhead.backend import compile_with
from fusedhead.kernels.triton_engine.rows.softmax_statistics import softmax_statistics
from fusedhead.lowering.plan.tokenwise import row_plan

pytestmark = [
    pytest.mark.filterwarnings("ignore:The CUDA Graph is empty"),  # Inductor's own, for its memory pool
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"),  # of a float32 product of the program's
]
D, V = 256, 32064
MEMORY = 64  # MiB: windows of 128 tokens
NAMES = ("distilled", "distilled_beside_the_loss", "reverse_kl", "jsd", "top64_distilled", "top5_beside_the_loss",
         "dpo_with_entropy", "grpo_with_kl")  # fmt: skip


def operands(tokens: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator = torch.Generator("cuda").manual_seed(tokens)
    h = torch.randn(tokens, D, generator=generator, device="cuda")
    w, t = (3 * torch.randn(V, D, generator=generator, device="cuda") / D**0.5 for _ in range(2))
    b = torch.rand(V, generator=generator, device="cuda") + 0.5
    y = torch.randint(0, V, (tokens,), generator=generator, device="cuda")
    drop = torch.arange(V, device="cuda") >= V - 64
    return h.to(dtype).requires_grad_(), w.to(dtype).requires_grad_(), b.to(dtype), drop, y, t.to(dtype)


def results(program: Callable[..., Tensor], given: tuple[Tensor, ...]) -> list[Tensor]:
    loss = program(*given)
    return [loss.detach(), *torch.autograd.grad(loss, given[:2])]


def in_float64(program: Callable[..., Tensor], given: tuple[Tensor, ...]) -> list[Tensor]:
    wide = tuple(x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x for x in given)
    cast, Tensor.float = Tensor.float, Tensor.double
    try:
        return results(program, wide)
    finally:
        Tensor.float = cast


def test_the_windows_here_are_several_and_in_groups() -> None:
    plan = row_plan((1000, V), torch.bfloat16, "cuda", heads=(False, True), calls=8, memory=MEMORY)
    assert plan.compiled
    assert 1 < plan.group < -(-1000 // plan.tokens)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_the_error_is_at_most_that_of_eager_code(name: str, dtype: torch.dtype) -> None:
    program, report = getattr(programs, name), fusedhead.Report()
    given = operands(1000, dtype)  # 1000: a last window that is not whole

    def backend(gm: torch.fx.GraphModule, inputs: list) -> Callable:
        options = {"fusedhead.min_logits": 0, "fusedhead.memory": MEMORY}
        return compile_with(gm, inputs, options=options, observe=report.extend)

    compiled = torch.compile(program, backend=backend, dynamic=False)
    truth, eager = in_float64(program, given), results(program, given)
    for _ in range(3):  # the last window: in pieces, compiled, compiled again
        for of, right, theirs, ours in zip(("loss", "dh", "dw"), truth, eager, results(compiled, given)):
            wrong, allowed = (((x.double() - right).norm() / right.norm()).item() for x in (ours, theirs))
            slack = 1e-3 if of == "loss" and dtype == torch.bfloat16 else 4e-6
            assert wrong <= 1.03 * allowed + slack, f"{of}: {wrong:.3e} of {allowed:.3e}"
    assert all(head.fused for head in report.heads), report


@pytest.mark.parametrize("vocab", [32064, 50257, 5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_row_statistics_are_those_of_float64(dtype: torch.dtype, vocab: int) -> None:
    torch.manual_seed(0)
    z = (torch.randn(77, vocab, device="cuda") * 8).to(dtype)
    z[1, ::2], z[2], z[3, -1], z[4, 0] = -math.inf, -math.inf, math.inf, math.nan
    for scale, (top, log_total) in zip((0.5, 1.0), softmax_statistics(z, [0.5, 1.0])):
        truth = (z.double() * scale).logsumexp(1, keepdim=True)
        odd = torch.isin(torch.arange(77, device="cuda"), torch.tensor([2, 3, 4], device="cuda"))
        assert torch.equal(log_total.isnan().flatten(), odd)
        torch.testing.assert_close((top + log_total).double()[~odd], truth[~odd], atol=4e-6, rtol=1e-6)


def test_cuda_graphs_replay_the_same_numbers() -> None:
    given = operands(512, torch.bfloat16)
    options = {"fusedhead.min_logits": 0, "fusedhead.memory": MEMORY}
    plain = torch.compile(programs.distilled, backend="fusedhead", options=options, dynamic=False)
    graphs = {**options, "triton.cudagraphs": True}
    graphed = torch.compile(lambda *x: programs.distilled(*x), backend="fusedhead", options=graphs, dynamic=False)
    for _ in range(3):
        torch.compiler.cudagraph_mark_step_begin()
        for g, p in zip(results(graphed, given), results(plain, given)):
            assert torch.equal(g, p)
