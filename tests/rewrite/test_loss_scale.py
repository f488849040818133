"""Float16 heads whose gradients are computed in the forward: right for any loss scale that comes later."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.eager_stack import Rewritten

N, D, V = 96, 32, 257
Program = Callable[[Tensor, Tensor, Tensor], Tensor]
SOFT = 0.1


def mean(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(h, w).float(), y)


def summed(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(h, w).float(), y, reduction="sum")


def smoothed(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(h, w).float(), y, label_smoothing=SOFT)


def weighted(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(h, w).float(), y, weight=torch.linspace(0.1, 2, V, device=h.device))


def scaled_inside(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(h, w).float(), y) * 4096


def two_heads(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return mean(h, w, y) + 0.01 * summed(h * 2, w, y)


def operands(seed: int, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(seed)
    y = torch.randint(0, V, (N,))
    y[: N // 3] = 5
    y[::17] = -100
    h, w = torch.randn(N, D), torch.randn(V, D) * 2 / D**0.5
    return h.half().to(device), w.half().to(device), y.to(device)


def results(program: Program, h: Tensor, w: Tensor, y: Tensor, scale: float) -> list[Tensor]:
    h, w = h.detach().requires_grad_(), w.detach().requires_grad_()
    loss = program(h, w, y)
    grads = torch.autograd.grad(loss * scale, (h, w))
    assert all(g.dtype == h.dtype for g in grads)
    return [loss.detach().double(), *(g.double() / scale for g in grads)]


def exact(program: Program, h: Tensor, w: Tensor, y: Tensor) -> list[Tensor]:
    cast, Tensor.float = Tensor.float, Tensor.double  # type: ignore[method-assign]
    try:
        if program is weighted:
            h, w, y = h.double().requires_grad_(), w.double().requires_grad_(), y
            weight = torch.linspace(0.1, 2, V).double()
            loss = F.cross_entropy(F.linear(h, w), y, weight=weight)
            return [loss.detach(), *torch.autograd.grad(loss, (h, w))]
        return results(program, h.double(), w.double(), y, 1.0)
    finally:
        Tensor.float = cast  # type: ignore[method-assign]


@pytest.mark.parametrize("scale", [1.0, 2.0**10, 2.0**16, 3.0e3])
@pytest.mark.parametrize("program", [mean, summed, smoothed, weighted, scaled_inside, two_heads])
def test_the_error_is_at_most_that_of_eager_code_for_every_loss_scale(program: Program, scale: float) -> None:
    scale = scale / {summed: N, scaled_inside: 4096, two_heads: N}.get(program, 1)
    rewritten = Rewritten(program)
    squares = torch.zeros(3, 2, dtype=torch.float64)
    for seed in range(3):
        inputs = operands(seed)
        truth = exact(program, *inputs)
        for at, (t, e, f) in enumerate(
            zip(truth, results(program, *inputs, scale), results(rewritten, *inputs, scale))
        ):
            squares[at] += torch.stack([(x - t).norm() / t.norm() for x in (f, e)]) ** 2
    assert (squares[:, 0] <= squares[:, 1] + 1e-13).all(), squares.sqrt()
    assert all("gradients in the forward sweep" in head.engine for head in rewritten.report.heads)
    assert all("times a power of two" in head.engine for head in rewritten.report.heads)


def test_a_gradient_that_eager_code_loses_is_kept_for_a_large_loss_scale() -> None:
    """A mean over so many tokens that its gradient, as it is, is below float16."""

    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(h, w).float(), y) * 1e-9

    inputs = operands(0)
    truth = exact(program, *inputs)
    got = results(Rewritten(program), *inputs, 2.0**40)
    for t, f in zip(truth, got):
        assert (t - f).norm() / t.norm() < 1e-3


def test_an_overflow_of_the_scaled_gradient_reaches_the_scaler() -> None:
    inputs = operands(0)
    for program in (mean, Rewritten(mean)):
        _, dh, dw = results(program, *inputs, 2.0**24)
        assert not dh.isfinite().all()
        assert not dw.isfinite().all()


def scaled_logits(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(h, w).float() * 0.5, y)


def z_loss(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    z = F.linear(h, w).float()
    return F.cross_entropy(z, y) + 1e-3 * z.logsumexp(-1).square().mean()


@pytest.mark.parametrize("program", [scaled_logits, z_loss])
def test_heads_without_a_bound_of_their_gradients_compute_them_in_the_backward(program: Program) -> None:
    rewritten = Rewritten(program)
    results(rewritten, *operands(0), 1.0)
    assert "recompute in the backward" in rewritten.report.heads[0].engine


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_function_keeps_gradients_that_are_below_float16(reduction: str) -> None:
    import fusedhead

    h, w, y = operands(1)
    truth = exact(lambda h, w, y: F.cross_entropy(F.linear(h, w), y, reduction=reduction), h, w, y)

    def function(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return fusedhead.linear_cross_entropy(h, w, y, reduction=reduction)

    scale = 1024.0 / (N if reduction == "sum" else 1)
    got = results(function, h, w, y, scale)
    for t, f in zip(truth[1:], got[1:]):
        assert (t - f).norm() / t.norm() < 6e-4
