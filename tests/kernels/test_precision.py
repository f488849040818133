"""Errors against float64 are no larger than eager code's in the same dtype, forward and backward, over several draws.

Slack, absolute and stated: a loss is the difference of two float32 statistics, each good to half a unit in its last
place, so 2^-23 of their size is allowed on top; a gradient may be worse than eager's by one part in 500, which
is what the luck of rounding moves the ratio by where both round alike.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from fusedhead.kernels.contract import Head, Needs, RowGrads, RowStats, Windows
from fusedhead.kernels.torch_engine import engine as torch_engine
from fusedhead.kernels.transform.transform import parse
from tests.lowering.heads import OPS, Operands, cross_entropy, distance, eager_losses, none, operands

LUCK = 1.002
DRAWS = 3


def kinds(kind: str, spread: float, dtype: torch.dtype) -> Operands:
    """Operands whose logits are plain, have nearly certain targets, share a large offset, or span 300 in a row."""
    o = operands(252, 1507, 123, spread=spread, u=False)
    if kind == "peaked":
        aim = o.w[o.y[:, 0]]
        o.h[:180] = 0.3 * o.h[:180] + (25 * aim / aim.norm(dim=1, keepdim=True) ** 2)[:180]
    if kind == "offset":
        o.h[:, 0] = o.w[:, 0] = 100.0
    if kind == "wide":
        o.h.mul_(torch.linspace(1, 75 / spread, 252)[:, None])
    float32 = [x.float() for x in o[3:]]
    return Operands(o.h.to(dtype), o.w.to(dtype), o.y, *float32)


def errors(losses, dh, dw, true):
    return [distance(a, b) for a, b in zip((losses, dh, dw), true)]


def with_gradients(o: Operands, dtype: torch.dtype):
    h, w = (x.to(dtype, copy=True).requires_grad_() for x in (o.h, o.w))
    losses = eager_losses(h, w, o.y)
    return (losses.detach(), *torch.autograd.grad(losses.mean(), (h, w)))


class Held:
    """Root mean squares over draws of the errors of loss, dh and dw: ours, eager code's, and the slack of the loss."""

    def __init__(self) -> None:
        self.squares = torch.zeros(3, 3, dtype=torch.float64)

    def add(self, ours, eager, true, lse) -> None:
        slack = 2.0**-23 * float(lse.double().norm() / true[0].norm())
        results = [errors(*ours, true), errors(*eager, true), [slack, 0, 0]]
        self.squares += torch.tensor(results, dtype=torch.float64).square()

    def check(self) -> None:
        ours, eager, slack = (self.squares / DRAWS).sqrt()
        allowed = torch.tensor([1.0, LUCK, LUCK], dtype=torch.float64) * eager + slack
        assert bool((ours <= allowed).all()), f"loss, dh, dw: {ours.tolist()}, eager {eager.tolist()}"


@pytest.fixture
def held() -> Iterator[Held]:
    """What a test adds its draws to, held to the rule when it is over."""
    result = Held()
    yield result
    result.check()


def over_draws(test: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(test)
    def drawn(**fixtures: Any) -> None:
        for _ in range(DRAWS):
            test(**fixtures)

    return drawn


@pytest.mark.parametrize("spread", [0.02, 1.0, 3.0])
@pytest.mark.parametrize("kind", ["plain", "peaked", "wide", "offset"])
@over_draws
def test_cross_entropy_errs_no_more_than_eager(held, multiplied, kind, spread):
    dtype = multiplied[0] if kind != "offset" else torch.float32  # in others: tests/ir/test_lse_differences.py
    o = kinds(kind, spread, dtype)
    true, eager = with_gradients(o, torch.float64), with_gradients(o, dtype)
    for memory in (0, -1):
        lse, picked, _, dh, dw, *_ = cross_entropy(o, torch.full((252,), 1 / 252), memory=memory)
        held.add((lse - picked[:, 0], dh, dw), eager, true, lse)


@pytest.mark.parametrize("spread", [0.45, 2.0])
@pytest.mark.parametrize("accumulate", [torch.bfloat16, torch.float32])
@over_draws
def test_sums_over_many_windows_err_no_more_than_eager(held, any_cpu, spread, accumulate):
    o = kinds("plain", spread, torch.bfloat16)
    true, eager = with_gradients(o, torch.float64), with_gradients(o, torch.bfloat16)
    c = torch.full((252,), 1 / 252)
    tokens = 32 if accumulate == torch.bfloat16 else 8  # 8 windows in place, 32 in float32: what the planner does
    stats, grads = torch_engine.head_loss(
        Head(*o, parse("")),
        RowGrads(c, -c[:, None]),
        Needs(True, True, False, False),
        Windows(tokens, 1507, accumulate),
    )
    held.add((stats.lse - stats.picked[:, 0], grads.h, grads.w), eager, true, stats.lse)


@over_draws
def test_a_capped_head_errs_no_more_than_eager(held, multiplied):
    dtype, _ = multiplied
    o = kinds("plain", 3.0, dtype)

    def run(kind):
        h, w = (x.to(kind, copy=True).requires_grad_() for x in (o.h, o.w))
        z = h @ w.T
        z = 30 * torch.tanh((z if kind == torch.float64 else z.float()) / 30)
        losses = torch.nn.functional.cross_entropy(z, o.y[:, 0], reduction="none")
        return (losses.detach(), *torch.autograd.grad(losses.mean(), (h, w)))

    true, eager = run(torch.float64), run(dtype)
    transform = f"mul:{1 / 30!r} tanh mul:30.0"
    lse, picked, _, dh, dw, *_ = cross_entropy(o, torch.full((252,), 1 / 252), transform)
    held.add((lse - picked[:, 0], dh, dw), eager, true, lse)


@over_draws
def test_policy_gradients_with_entropy_err_no_more_than_eager(held, multiplied):
    dtype, _ = multiplied
    o = kinds("plain", 3.0, dtype)
    advantage, bonus = torch.randn(252), 0.01 * torch.rand(252)

    def run(kind):
        h, w = (x.to(kind, copy=True).requires_grad_() for x in (o.h, o.w))
        z = h @ w.T
        logp = torch.log_softmax(z if kind == torch.float64 else z.float(), 1)
        chosen, entropy = logp.gather(1, o.y)[:, 0], -(logp.exp() * logp).sum(1)
        loss = -(advantage * chosen + bonus * entropy)
        return (loss.detach(), *torch.autograd.grad(loss.sum(), (h, w)))

    true, eager = run(torch.float64), run(dtype)
    head = Head(*o, parse(""))
    windows = Windows(252, 512, dtype)
    stats = torch_engine.head_stats(head, frozenset({"lse", "picked", "entropy"}), windows)
    loss = -(advantage * (stats.picked[:, 0] - stats.lse) + bonus * stats.entropy)
    upstream = RowGrads(advantage, -advantage[:, None], entropy=-bonus)
    saved = RowStats(stats.lse, entropy=stats.entropy, lse_low=stats.lse_low)
    grads = torch_engine.head_stats_backward(head, upstream, saved, Needs(True, True, False, False), windows)
    held.add((loss, grads.h, grads.w), eager, true, stats.lse)


@pytest.mark.parametrize("bonus", [0.0, 0.5])
@over_draws
def test_logits_of_size_200_err_no_more_than_eager_when_they_are_recomputed(held, bonus):
    # half a unit in the last place of an lse of 200 is 8e-6 of each probability
    o = operands(252, 1507, 64, dtype=torch.float32, spread=60.0, u=False)
    upstream = torch.rand(252) + 0.5

    def run(kind):
        h, w = (x.to(kind, copy=True).requires_grad_() for x in (o.h, o.w))
        logp = torch.log_softmax(h @ w.T, 1)
        loss = -logp.gather(1, o.y)[:, 0] - bonus * (logp.exp() * logp).sum(1)
        return (loss.detach(), *torch.autograd.grad(loss, (h, w), upstream.to(kind)))

    true, eager = run(torch.float64), run(torch.float32)
    h, w = o.h.requires_grad_(), o.w.requires_grad_()
    stats = "lse,picked,entropy" if bonus else "lse,picked"
    lse, picked, _, entropy, *_ = OPS.head_stats(*o, "", stats, 0)
    loss = lse - picked[:, 0] + (bonus * entropy if bonus else 0)
    ours = (loss.detach(), *torch.autograd.grad(loss, (h, w), upstream))
    held.add(ours, eager, true, lse.detach())


@over_draws
def test_label_smoothing_errs_no_more_than_eager(held, multiplied):
    dtype, _ = multiplied
    o = kinds("plain", 1.0, dtype)

    def run(kind):
        h, w = (x.to(kind, copy=True).requires_grad_() for x in (o.h, o.w))
        z = h @ w.T
        z = z if kind == torch.float64 else z.float()
        losses = torch.nn.functional.cross_entropy(z, o.y[:, 0], reduction="none", label_smoothing=0.1)
        return (losses.detach(), *torch.autograd.grad(losses.mean(), (h, w)))

    true, eager = run(torch.float64), run(dtype)
    c, e = torch.full((252,), 1 / 252), none(o.h)
    lse, picked, total, dh, dw, *_ = torch.ops.fusedhead.head_loss(
        *o, c, -0.9 * c[:, None], -0.1 / 1507 * c, e, "", "lse,picked,sum", 0, True, True, False, False
    )
    losses = lse - 0.9 * picked[:, 0] - 0.1 / 1507 * total
    held.add((losses, dh, dw), eager, true, lse)
