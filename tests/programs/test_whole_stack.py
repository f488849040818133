"""The whole stack on the CPU: programs as users write them, through Inductor, against eager code."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusedhead

B, T, D, V = 2, 6, 16, 48
Program = Callable[..., Tensor | tuple[Tensor, ...]]


@pytest.fixture
def operands() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    h = torch.randn(B, T, D, requires_grad=True)
    w = nn.Parameter(torch.randn(V, D) * 0.3)
    b = nn.Parameter(torch.randn(V))
    y = torch.randint(0, V, (B, T))
    y[0, 1] = -1
    return h, w, b, y


def outputs_and_gradients(program: Program, operands: tuple[Tensor, ...]) -> list[Tensor]:
    for tensor in operands:
        tensor.grad = None
    out = program(*operands)
    out = out if isinstance(out, tuple) else (out,)
    total = sum((o.float() * 1.5).sum() for o in out if o.requires_grad)
    if isinstance(total, Tensor):
        total.backward()
    return [o.detach() for o in out] + [t.grad for t in operands if t.grad is not None]


def assert_same(program: Program, operands: tuple[Tensor, ...], *, atol: float = 2e-6, **options: object) -> None:
    """Same outputs and gradients, in the same dtypes and shapes, as eager code."""
    expected = outputs_and_gradients(program, operands)
    got = outputs_and_gradients(torch.compile(program, backend="fusedhead", **options), operands)  # type: ignore[arg-type]
    assert len(got) == len(expected)
    for a, e in zip(got, expected):
        assert (a.dtype, a.shape) == (e.dtype, e.shape)
        torch.testing.assert_close(a, e, atol=atol, rtol=1e-5, equal_nan=True)


def nanogpt_tail(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    logits = F.linear(h, w)
    return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), y.view(-1), ignore_index=-1)


def loss_only(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(h, w, b).float().view(-1, V), y.view(-1), ignore_index=-1)


def log_probs(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    return (h @ w.T).log_softmax(-1).gather(-1, y.clamp(min=0)[..., None]).squeeze(-1)


def capped_and_shifted(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    z = 30 * torch.tanh(F.linear(h, w) / 30)
    z = z[..., :-1, :].contiguous()
    return F.cross_entropy(z.view(-1, V), y[..., 1:].reshape(-1), ignore_index=-1, label_smoothing=0.1)


def checkpointed(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    return torch.utils.checkpoint.checkpoint(loss_only, h, w, b, y, use_reentrant=False)


def two_heads_one_weight(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    first = F.cross_entropy((h @ w.T).view(-1, V), y.view(-1), ignore_index=-1)
    return first + 0.3 * F.cross_entropy(F.linear(h.tanh(), w).transpose(1, 2), y, ignore_index=-1)


def with_z_loss(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    z = F.linear(h, w).view(-1, V)
    return F.cross_entropy(z, y.view(-1), ignore_index=-1) + 1e-2 * torch.logsumexp(z, -1).square().mean()


def loss_used_nonlinearly(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    nll = F.cross_entropy(F.linear(h, w).view(-1, V), y.view(-1), ignore_index=-1, reduction="none")
    return (nll * torch.exp(-nll).detach()).sum() + nll.pow(2).mean()


PROGRAMS = [
    nanogpt_tail,
    loss_only,
    log_probs,
    capped_and_shifted,
    checkpointed,
    two_heads_one_weight,
    with_z_loss,
    loss_used_nonlinearly,
]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: p.__name__)
def test_outputs_and_gradients_are_those_of_eager_code(program: Program, operands: tuple[Tensor, ...]) -> None:
    assert_same(program, operands)


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: p.__name__)
def test_every_head_is_fused(program: Program, operands: tuple[Tensor, ...]) -> None:
    report = fusedhead.explain(program, options={"fusedhead.strict": True})(*operands)
    assert report.heads
    assert all(head.fused and head.reason == "" for head in report.heads)


def test_dynamic_shapes_compile_once(operands: tuple[Tensor, ...]) -> None:
    _, w, b, _ = operands
    graphs = []
    compiled = torch.compile(
        loss_only, dynamic=True, backend=lambda gm, x: graphs.append(gm) or fusedhead.fusedhead(gm, x)
    )
    for tokens in (4, 7, 16):
        h, y = torch.randn(B, tokens, D, requires_grad=True), torch.randint(0, V, (B, tokens))
        torch.testing.assert_close(compiled(h, w, b, y), loss_only(h, w, b, y))
    assert len(graphs) == 1


def test_ambient_autocast_casts_as_the_program_did(operands: tuple[Tensor, ...]) -> None:
    def under_autocast(*args: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return compiled(*args)

    compiled = torch.compile(nanogpt_tail, backend="fusedhead")
    got = outputs_and_gradients(under_autocast, operands)
    compiled = nanogpt_tail  # type: ignore[assignment]
    expected = outputs_and_gradients(under_autocast, operands)
    for a, e in zip(got, expected):
        assert a.dtype == e.dtype
        torch.testing.assert_close(a, e, atol=0.05, rtol=0.05)


def test_autocast_inside_the_function(operands: tuple[Tensor, ...]) -> None:
    def program(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits, loss = nanogpt_tail(h, w, b, y)
        return logits.float(), loss

    assert_same(program, operands, atol=0.1)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_only_the_forward_runs(mode: Callable, operands: tuple[Tensor, ...]) -> None:
    with mode():
        torch.testing.assert_close(
            torch.compile(log_probs, backend="fusedhead")(*operands), log_probs(*operands), atol=1e-5, rtol=1e-5
        )
        report = fusedhead.explain(log_probs)(*operands)
    assert "forward only" in report.heads[0].engine


class TiedModel(nn.Module):
    """Embedding and head share one weight; the loss is returned beside the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, D)
        self.mix = nn.Linear(D, D)
        self.head = nn.Linear(D, V, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.head(torch.tanh(self.mix(self.embed(x))))
        return logits, F.cross_entropy(logits.flatten(0, 1), y.flatten())


def train(model: nn.Module, step: Callable, accumulate: int) -> list[float]:
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for _ in range(3):
        for _ in range(accumulate):
            x = torch.randint(0, V, (B, T))
            _, loss = step(x, x.roll(1, -1))
            (loss / accumulate).backward()
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses


def test_a_tied_model_trains_as_in_eager_mode_with_accumulated_gradients() -> None:
    model = TiedModel()
    twin = TiedModel()
    twin.load_state_dict(model.state_dict())
    expected = train(twin, twin, accumulate=2)
    got = train(model, torch.compile(model, backend="fusedhead"), accumulate=2)
    assert got == pytest.approx(expected, rel=1e-5)
    for a, e in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(a, e, atol=1e-6, rtol=1e-5)


def test_all_labels_ignored_is_nan_for_the_mean_and_zero_for_the_sum(operands: tuple[Tensor, ...]) -> None:
    h, w, b, y = operands
    ignored = torch.full_like(y, -1)
    assert_same(loss_only, (h, w, b, ignored))

    def summed(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(h, w).view(-1, V), y.view(-1), ignore_index=-1, reduction="sum")

    assert_same(summed, (h, w, b, ignored))
    assert summed(h, w, b, ignored).item() == 0


def test_a_label_out_of_range_raises_the_class_that_eager_code_raises(operands: tuple[Tensor, ...]) -> None:
    h, w, b, y = operands
    bad = y.clone()
    bad[0, 0] = V
    with pytest.raises(IndexError):
        loss_only(h, w, b, bad)
    with pytest.raises(IndexError, match=f"label {V} is out of range"):
        torch.compile(loss_only, backend="fusedhead")(h, w, b, bad)
    with pytest.raises(RuntimeError):
        log_probs(h, w, b, bad)
    with pytest.raises(RuntimeError, match=f"label {V} is out of range"):
        torch.compile(log_probs, backend="fusedhead")(h, w, b, bad)


def test_a_frozen_weight_gets_no_gradient_and_h_still_does(operands: tuple[Tensor, ...]) -> None:
    w = operands[1]
    w.requires_grad_(False)
    assert_same(loss_only, operands)
    assert w.grad is None
