"""The whole stack on one GPU: errors against float64, CUDA graphs, dynamic shapes, no host sync, memory."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fusedhead
from fusedhead.backend import compile_with

pytestmark = [
    pytest.mark.filterwarnings("ignore:The CUDA Graph is empty"),  # Inductor's own, when it makes its memory pool
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype"),
]
N, D, V = 252, 128, 5003
OCTAVE = range(128, 256)  # token counts
Program = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def mean_loss(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(h, w).float(), y, ignore_index=-1)


def with_bias_and_smoothing(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(h, w, b).float(), y, ignore_index=-1, label_smoothing=0.1)


def capped(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(30 * torch.tanh(F.linear(h, w).float() / 30), y, ignore_index=-1)


def weighted_log_probs(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    log_probs = (h @ w.T).float().log_softmax(-1).gather(-1, y.clamp(min=0)[:, None]).squeeze(-1)
    weights = torch.arange(len(h), device=h.device, dtype=log_probs.dtype) / len(h) - 0.5
    return (log_probs * weights).pow(2).sum()


def with_z_loss(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    z = F.linear(h, w).float()
    return F.cross_entropy(z, y, ignore_index=-1) + 1e-4 * torch.logsumexp(z, -1).square().mean()


PROGRAMS = [mean_loss, with_bias_and_smoothing, capped, weighted_log_probs, with_z_loss]


def operands(dtype: torch.dtype, offset: float = 0.0, spread: float = 1.0, tokens: int = N) -> tuple[Tensor, ...]:
    generator = torch.Generator("cuda").manual_seed(tokens)
    h = torch.randn(tokens, D, generator=generator, device="cuda")
    w = torch.randn(V, D, generator=generator, device="cuda") * spread / D**0.5
    b = torch.randn(V, generator=generator, device="cuda") + offset
    y = torch.randint(0, V, (tokens,), generator=generator, device="cuda")
    y[::17] = -1
    return (*(x.to(dtype).requires_grad_() for x in (h, w, b)), y)


def results(program: Program, inputs: tuple[Tensor, ...], dtype: torch.dtype | None = None) -> list[Tensor]:
    leaves = [(x.detach().to(dtype or x.dtype).requires_grad_() if x.is_floating_point() else x) for x in inputs]
    loss = program(*leaves)
    loss.backward()
    return [loss.detach()] + [x.grad for x in leaves[:3] if x.grad is not None]


def reporting(report: fusedhead.Report) -> Callable:
    """The backend, which fuses heads of any size and adds to the report."""

    def backend(gm: torch.fx.GraphModule, inputs: list) -> Callable:
        return compile_with(gm, inputs, options={"fusedhead.min_logits": 0}, observe=report.extend)

    return backend


def in_float64(program: Program) -> Program:
    """The same program without its casts to float32."""

    def wide(*args: Tensor) -> Tensor:
        cast, Tensor.float = Tensor.float, Tensor.double
        try:
            return program(*args)
        finally:
            Tensor.float = cast

    return wide


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: p.__name__)
def test_the_error_is_at_most_that_of_eager_code_in_the_same_dtype(program: Program, dtype: torch.dtype) -> None:
    """Mean square over an octave of token counts.

    Most of the gradient of an untrained head is its labels' rows, -h / N. Eager code rounds 1 / N, one number, ours h,
    many: on average over N the same, but for one N eager's error is anything from 0.6 to 1.4 times its average. So
    the difference of the squares is a mean of numbers that scatter, and must not be above twice its standard error.
    """
    report = fusedhead.Report()
    compiled = torch.compile(program, backend=reporting(report))
    squares: dict[str, list[Tensor]] = {}
    for tokens in OCTAVE:
        inputs = operands(dtype, tokens=tokens)
        truth = results(in_float64(program), inputs, torch.float64)
        runs = truth, results(program, inputs), results(compiled, inputs)
        for name, t, e, f in zip(("loss", "dh", "dw", "db"), *runs):
            assert f.dtype == e.dtype
            both = torch.stack([(x.double() - t).norm() / t.norm() for x in (f, e)]) ** 2
            squares.setdefault(name, []).append(both)
    assert report.graphs <= 2, "the first size, then any"
    assert [head.fused for head in report.heads] == [True] * report.graphs, report
    for name, each in squares.items():
        pairs = torch.stack(each)
        ours, eager = pairs.mean(0).sqrt().tolist()
        excess = pairs[:, 0] - pairs[:, 1]
        scatter = 2 * excess.std().item() / len(pairs) ** 0.5
        assert excess.mean().item() <= scatter + 4e-12, f"{name}: {ours:.3e} of {eager:.3e}"


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: p.__name__)
def test_with_tf32_the_error_is_at_most_that_of_eager_code_with_tf32(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    test_the_error_is_at_most_that_of_eager_code_in_the_same_dtype(program, torch.float32)


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: p.__name__)
def test_cuda_graphs_replay_the_same_numbers(program: Program) -> None:
    graphed = torch.compile(program, backend="fusedhead", mode="reduce-overhead")
    plain = torch.compile(program, backend="fusedhead")
    for step in range(4):
        inputs = operands(torch.bfloat16, offset=float(step))
        torch.compiler.cudagraph_mark_step_begin()
        for g, p in zip(results(graphed, inputs), results(plain, inputs)):
            assert torch.equal(g, p)


@pytest.mark.parametrize("program", [mean_loss, weighted_log_probs], ids=lambda p: p.__name__)
def test_no_host_sync(program: Program) -> None:
    inputs = operands(torch.bfloat16)
    compiled = torch.compile(program, backend="fusedhead")
    results(compiled, inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        results(compiled, inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_row_program_runs_where_dispatch_modes_are_active() -> None:
    """AOTAutograd's first run of a graph checks custom ops in a mode; gradients are traced inside of the op there."""
    torch.manual_seed(0)
    teacher = torch.randn(V, D, device="cuda", dtype=torch.bfloat16)

    def program(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            target = F.softmax(F.linear(h, teacher.to(h.dtype)).float() / 8, -1)
        return F.kl_div(F.log_softmax(F.linear(h, w).float(), -1), target, reduction="batchmean")

    inputs, report = operands(torch.bfloat16), fusedhead.Report()
    compiled = torch.compile(program, backend=reporting(report))
    truth = results(in_float64(program), inputs, torch.float64)
    for _ in range(2):
        for t, e, f in zip(truth, results(program, inputs), results(compiled, inputs)):
            ours, eager = ((x.double() - t).norm() / t.norm() for x in (f, e))
            assert ours <= 1.02 * eager + 2e-6
    assert any(head.fused for head in report.heads), report


def test_dynamic_shapes_compile_once() -> None:
    graphs = []

    def count(gm: torch.fx.GraphModule, x: list) -> Callable:
        graphs.append(gm)
        return fusedhead.fusedhead(gm, x)

    compiled = torch.compile(mean_loss, backend=count, dynamic=True)
    _, w, b, _ = operands(torch.bfloat16)
    w = torch.nn.Parameter(w.detach())
    for tokens in (1, 7, 252, 1000):
        h = torch.randn(tokens + 1, D, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        y = torch.randint(0, V, (tokens + 1,), device="cuda")
        torch.testing.assert_close(compiled(h, w, b, y), mean_loss(h, w, b, y), atol=5e-3, rtol=5e-3)
    assert len(graphs) == 1


def test_the_workspace_stays_inside_its_budget() -> None:
    tokens, hidden, vocab, mebibytes = 8192, 512, 65536, 64
    h = torch.randn(tokens, hidden, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    w = torch.randn(vocab, hidden, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    y = torch.randint(0, vocab, (tokens,), device="cuda")
    compiled = torch.compile(
        lambda h, w, y: F.cross_entropy(F.linear(h, w).float(), y),
        backend="fusedhead",
        options={"fusedhead.memory": mebibytes},
    )
    for _ in range(2):
        h.grad = w.grad = None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        compiled(h, w, y).backward()
        gradients = 2 * (h.numel() + w.numel())
        extra = torch.cuda.max_memory_allocated() - before - gradients
    small = 8 * tokens * 64 + (8 << 20)  # [N] vectors and cuBLAS' own workspace
    assert extra <= (mebibytes << 20) + small, f"{extra / 2**20:.1f} MiB"


BAD_LABEL = """
import torch, torch.nn.functional as F
h, w = torch.randn(8, 64, device="cuda"), torch.randn(100, 64, device="cuda")
y = torch.full((8,), 100, device="cuda")
torch.compile(lambda h, w, y: F.cross_entropy(F.linear(h, w), y), backend="fusedhead")(h, w, y).item()
"""


def test_a_label_out_of_range_is_a_device_assert() -> None:
    done = subprocess.run([sys.executable, "-c", BAD_LABEL], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "a label is out of range: it must lie in [0, vocabulary)" in done.stderr
