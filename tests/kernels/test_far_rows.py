"""Logits of any size that float32 holds: a loss and gradients that err no more than eager code's, on a CPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fusedhead.kernels.contract import Head, Needs, RowGrads, RowStats, Windows
from fusedhead.kernels.torch_engine import engine
from fusedhead.kernels.transform.transform import parse
from tests.lowering.heads import MULTIPLIED, multiplies

N, D, V = 37, 16, 1100
NEEDS = Needs(True, True, False, False)
SIZES = (1e2, 1e4, 1e6, 1e8, 2e9, 1e12, 1e30, 1e37)


def head_of(size: float, dtype: torch.dtype) -> Head:
    """Logits of about that size; half of the labels have the largest one."""
    torch.manual_seed(0)
    h, w = (torch.randn(N, D) * size / D**0.5).to(dtype), torch.randn(V, D).to(dtype)
    y = torch.randint(0, V, (N, 1))
    y[::2, 0] = (h.float() @ w.float().t()).argmax(1)[::2]
    none = torch.empty(0)
    return Head(h, w, y, none, none, none, parse(""))


def losses(stats: RowStats) -> Tensor:
    """As graphs take them."""
    assert stats.picked is not None
    assert stats.lse_low is not None
    return (stats.lse - stats.picked[:, 0]) + stats.lse_low


def eager(head: Head, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Losses, dh and dw of their mean, computed in ``dtype``, the softmax in float32 at least."""
    h, w = (x.to(dtype, copy=True).requires_grad_() for x in (head.h, head.w))
    z = h @ w.t()
    each = F.cross_entropy(z if dtype == torch.float64 else z.float(), head.y[:, 0], reduction="none")
    return each.detach(), *torch.autograd.grad(each.mean(), (h, w))


def off(got: tuple[Tensor | None, ...], true: tuple[Tensor, ...]) -> Tensor:
    return torch.stack([(a.double() - b).abs().max() / b.abs().max() for a, b in zip(got, true)])  # type: ignore[union-attr]


@pytest.mark.parametrize("columns", [V, 600], ids=["one sweep", "two sweeps"])
@pytest.mark.parametrize(("dtype", "products"), MULTIPLIED[:3])
@pytest.mark.parametrize("size", SIZES)
def test_a_loss_of_logits_of_any_size_errs_no_more_than_eager_code(monkeypatch, size, dtype, products, columns):
    multiplies(monkeypatch, dtype, products)
    head, windows = head_of(size, dtype), Windows(16, columns, torch.float32)
    c = RowGrads(torch.full((N,), 1 / N), torch.full((N, 1), -1 / N))
    true = eager(head, torch.float64)
    allowed = off(eager(head, dtype), true) * 1.5 + 2.0**-22  # the luck of one draw
    stats, grads = engine.head_loss(head, c, NEEDS, windows)
    assert bool((off((losses(stats), grads.h, grads.w), true) <= allowed).all())
    stats = engine.head_stats(head, frozenset({"lse", "picked"}), windows)
    grads = engine.head_stats_backward(head, c, stats, NEEDS, windows)
    assert bool((off((losses(stats), grads.h, grads.w), true) <= allowed).all())
    assert bool((losses(stats) >= 0).all())


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("cap", ["", "mul:0.5", "mul:0.0333 tanh mul:30.0"])
def test_the_least_and_the_largest_number_are_logits_like_others(sign, cap):
    """As ``masked_fill(mask, finfo.min)`` and a minus sign make them."""
    torch.manual_seed(0)
    h, w = torch.randn(N, 1), torch.randn(V, 1)
    w[:900] = sign * torch.finfo(torch.float32).min / 8
    h[:, 0] = h[:, 0].abs().clamp(0.5, 8)
    none = torch.empty(0)
    head = Head(h, w, torch.randint(0, V, (N, 1)), none, none, none, parse(cap))
    c = RowGrads(torch.ones(N), -torch.ones(N, 1))
    stats, grads = engine.head_loss(head, c, NEEDS, Windows(16, V, torch.float32))
    a, b = h.clone().requires_grad_(), w.clone().requires_grad_()
    z = a @ b.t()
    z = {"": lambda: z, "mul:0.5": lambda: z * 0.5}.get(cap, lambda: torch.tanh(z * 0.0333) * 30.0)()
    each = F.cross_entropy(z, head.y[:, 0], reduction="none")
    expected = each, *torch.autograd.grad(each.sum(), (a, b))
    sizes = (1.0, float(w.abs().max()), float(h.abs().max()))  # of what is summed up, and may cancel
    for got, want, size in zip((losses(stats), grads.h, grads.w), expected, sizes):
        torch.testing.assert_close(got, want.detach(), rtol=1e-4, atol=1e-4 * size)
