"""Heads whose logits are stacked, taken apart again for their losses, and returned: MusicGen and its kin."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.deferred.heads import D, Operations, V, is_deferred
from tests.eager_stack import Rewritten
from tests.programs.claims import D as WIDTH
from tests.programs.claims import hidden, labels, not_fused, right, weight

BOOKS, B, T = 3, 4, 8


class Codebooks(nn.Module):
    """MusicGen's decoder head: (loss [], logits [B * BOOKS, T, V])."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(D, D)
        self.heads = nn.ModuleList([nn.Linear(D, V, bias=False) for _ in range(BOOKS)])

    def forward(self, h: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.mix(h))
        stacked = torch.stack([head(h) for head in self.heads], dim=1)
        logits = stacked[:, :, -y.shape[1] :]
        loss = torch.zeros([])
        for k in range(BOOKS):
            loss = loss + F.cross_entropy(logits[:, k].contiguous().view(-1, V), y[..., k].contiguous().view(-1))
        return loss / BOOKS, stacked.reshape(-1, *stacked.shape[2:])


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(B, T, D), torch.randint(0, V, (B, T - 1, BOOKS))


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


@pytest.mark.parametrize("logits", ["deferred", "eager"])
@pytest.mark.parametrize("part", ["the loss", "the logits", "both"])
def test_losses_and_logits_of_stacked_heads(part: str, logits: str) -> None:
    model, (h, y) = Codebooks(), batch()
    run = Rewritten(model, {"fusedhead.logits": logits})
    total: Callable[[Any], Tensor] = {
        "the loss": lambda out: out[0],
        "the logits": lambda out: out[1].square().mean(),
        "both": lambda out: out[0] + out[1].sin().mean(),
    }[part]
    wanted, actual = total(model(h, y)), total(run(h, y))
    torch.testing.assert_close(actual, wanted)
    torch.testing.assert_close(gradients(model, actual), gradients(model, wanted), rtol=1e-4, atol=1e-6)
    assert [head.fused for head in run.report.heads] == [True] * BOOKS


def test_stacked_logits_that_nobody_reads_are_never_built() -> None:
    model, (h, y) = Codebooks(), batch()
    run = Rewritten(model, {"fusedhead.logits": "deferred"})
    loss, logits = run(h, y)
    with Operations(B * T) as ran:
        loss.backward()
    assert ran.large == []
    assert is_deferred(logits)
    assert logits.shape == (B * BOOKS, T, V)
    torch.testing.assert_close(torch.stack(logits.chunk(B)), torch.stack(model(h, y)[1].chunk(B)))


def test_numbers_of_tokens_may_vary() -> None:
    model = Codebooks()
    run = Rewritten(model, {"fusedhead.logits": "deferred"}, dynamic=True)
    for rows, length in ((2, 6), (3, 5), (5, 7)):
        h, y = torch.randn(rows, length, D), torch.randint(0, V, (rows, length - 1, BOOKS))
        torch.testing.assert_close(run(h, y)[0], model(h, y)[0])


def two(h: Tensor, v: Tensor, w: Tensor) -> Tensor:
    return torch.stack([F.linear(h, v), F.linear(h, w)])


def test_a_stack_that_is_not_returned() -> None:
    def program(h: Tensor, v: Tensor, w: Tensor, y: Tensor) -> Tensor:
        z = two(h, v, w)[..., 1:, :]
        return F.cross_entropy(z[0], y) + 2 * F.cross_entropy(z[-1, ...], y)

    right(program, hidden(7, WIDTH), weight(), weight(), labels(6), fused=2)


def test_a_part_that_nobody_takes() -> None:
    def program(h: Tensor, v: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        z = two(h, v, w)
        return F.cross_entropy(z[1], y), z

    right(program, hidden(6, WIDTH), weight(), weight(), labels(6), fused=1)


def test_a_stack_with_other_uses_is_not_taken_apart() -> None:
    def program(h: Tensor, v: Tensor, w: Tensor, y: Tensor) -> Tensor:
        z = two(h, v, w)
        return F.cross_entropy(z[0], y) + F.cross_entropy(z[1], y) + z.flip(1).cumsum(1).square().sum()

    not_fused(program, hidden(6, WIDTH), weight(), weight(), labels(6))


def test_a_part_that_is_written_to_is_not_taken_apart() -> None:
    def program(h: Tensor, v: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        z = two(h, v, w)
        z[0] *= 2
        return F.cross_entropy(z[0], y) + F.cross_entropy(z[1], y), z

    not_fused(program, hidden(6, WIDTH), weight(), weight(), labels(6))


def test_an_index_that_is_a_tensor_says_at_run_time_which_head_it_is() -> None:
    def program(h: Tensor, v: Tensor, w: Tensor, y: Tensor, k: Tensor) -> Tensor:
        z = two(h, v, w)
        return F.cross_entropy(z[k][0], y) + F.cross_entropy(z[1], y)

    # the stack, for what only the data decide, and beside it the head that is picked by its number
    right(program, hidden(6, WIDTH), weight(), weight(), labels(6), torch.tensor([1, 0]), fused=2)
