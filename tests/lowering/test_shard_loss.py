"""A head whose other columns lie elsewhere: statistics of its own, gradients of the softmax of all."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fusedhead.kernels.contract import Head, Needs, RowGrads, RowStats, Windows
from fusedhead.kernels.torch_engine import engine
from fusedhead.kernels.transform.transform import parse
from fusedhead.lowering import shard_loss

N, D, V, HERE = 40, 12, 90, 50
WIDE = torch.float64


def halves(offset: float, dtype: torch.dtype) -> tuple[Head, Tensor, Tensor]:
    """A head with the first classes, the rows of the other classes, and the labels; some are elsewhere."""
    make = torch.Generator().manual_seed(4)
    h, w = (torch.randn(size, generator=make, dtype=WIDE).to(dtype) for size in ((N, D), (V, D)))
    h[:, 0], w[HERE:, 0], w[:HERE, 0] = 1.0, offset, 0.0
    y = torch.randint(V, (N, 1), generator=make)
    cell = torch.where(y < HERE, y, 0)
    empty = h.new_empty(0)
    return Head(h, w[:HERE], cell, empty.reshape(0, HERE), empty.reshape(0, N), empty, parse("")), w[HERE:], y


def truth(head: Head, others: Tensor, y: Tensor, c: RowGrads) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, dh of the columns here and dw, in float64."""
    h, w = head.h.to(WIDE), head.w.to(WIDE).requires_grad_()
    z = torch.cat((h.detach() @ w.t(), h @ others.to(WIDE).t()), 1).requires_grad_()
    z.retain_grad()
    lse, picked = z.logsumexp(1), z.gather(1, y)
    loss = (c.lse * lse).sum() + (c.picked * picked).sum() + (c.square * lse * lse).sum()
    loss.backward()
    return loss.detach(), z.grad[:, :HERE] @ w.detach(), w.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offset", [0.0, 30.0, -30.0, 2000.0, -2000.0])
def test_a_row_takes_the_softmax_of_all_columns(offset: float, dtype: torch.dtype) -> None:
    head, others, y = halves(offset, dtype)
    make = torch.Generator().manual_seed(5)
    c_lse, c_picked = (torch.rand(size, generator=make) for size in ((N,), (N, 1)))
    square = 1e-3 * torch.rand(N, generator=make)
    elsewhere = (head.h.to(WIDE) @ others.to(WIDE).t()).logsumexp(1)
    asked: list[slice] = []

    def other_columns(tokens: slice, own: RowStats) -> Tensor:
        asked.append(tokens)
        return elsewhere[tokens]

    here = RowGrads(c_lse, torch.where(y < HERE, -c_picked, 0), square=square)
    needs, windows = Needs(True, True, False, False), Windows(16, HERE, torch.float32)
    assert engine.other_columns_serve(head, here, needs, windows)
    stats, grads = engine.head_loss(head, here, needs, windows, other_columns)
    own = (head.h.to(WIDE) @ head.w.to(WIDE).t()).logsumexp(1)
    assert [i.start for i in asked] == [0, 16, 32]
    torch.testing.assert_close(stats.lse.to(WIDE), own, rtol=torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)
    _, dh, dw = truth(head, others, y, RowGrads(c_lse, -c_picked, square=square))
    step = torch.finfo(dtype).eps
    for got, exact in ((grads.h, dh), (grads.w, dw)):
        assert got is not None
        assert (got.to(WIDE) - exact).abs().max() <= 4 * step * exact.abs().max() + 1e-12


def test_a_row_that_is_infinite_elsewhere_has_no_gradient_here_and_leaves_the_others_alone() -> None:
    head, others, _ = halves(0.0, torch.float32)
    elsewhere = (head.h.to(WIDE) @ others.to(WIDE).t()).logsumexp(1)
    c, needs, windows = RowGrads(torch.ones(N)), Needs(True, False, False, False), Windows(16, HERE, torch.float32)
    _, plain = engine.head_loss(head, c, needs, windows, lambda i, _: elsewhere[i])
    broken = elsewhere.clone()
    broken[3] = torch.inf
    _, grads = engine.head_loss(head, c, needs, windows, lambda i, _: broken[i])
    assert grads.h is not None
    assert plain.h is not None
    assert grads.h[3].isnan().all()
    assert torch.equal(torch.cat((grads.h[:3], grads.h[4:])), torch.cat((plain.h[:3], plain.h[4:])))


@pytest.mark.parametrize("level", [3e8, -3e8])
def test_rows_far_from_zero_ask_once(level: float) -> None:
    head, _, _ = halves(0.0, torch.float32)
    head = head._replace(w=torch.cat((torch.full((HERE, 1), level), head.w[:, 1:]), 1))
    asked: list[int] = []

    def other_columns(tokens: slice, own: RowStats) -> Tensor:
        asked.append(tokens.start)
        return own.lse.to(WIDE) + own.lse_low.to(WIDE)  # as many columns as here, of the same logits

    c, needs, windows = RowGrads(torch.ones(N)), Needs(True, True, False, False), Windows(16, HERE, torch.float32)
    _, alone = engine.head_loss(head, c, needs, windows)
    _, grads = engine.head_loss(head, c, needs, windows, other_columns)
    assert asked == [0, 16, 32]
    torch.testing.assert_close(grads.h, alone.h / 2)
    torch.testing.assert_close(grads.w, alone.w / 2)


def test_the_op_has_the_arguments_of_a_loss_and_a_place() -> None:
    loss, shard = (getattr(torch.ops.fusedhead, name).default._schema for name in ("head_loss", "shard_loss"))
    names = [argument.name for argument in shard.arguments]
    place = ["first", "vocab", "group", "reduce", "own_labels", "after", "recipient"]
    assert names[: -len(place)] == [argument.name for argument in loss.arguments][: len(names) - len(place)]
    assert names[-len(place) :] == place
    assert len(names) == shard_loss.LOSS_INPUTS
