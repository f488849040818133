"""Logits that are put together from pieces: one product, one sweep, and nothing but what the program says."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fusedhead.graph.op_names import NEGATES, SCALES
from tests.programs.claims import D, V, compiled, hidden, labels, right, weight

Join = Callable[[Tensor, Tensor, Tensor], Tensor]

WHOLE: dict[str, Join] = {
    "hidden states by token": lambda h, w, b: torch.cat([F.linear(x, w) for x in h.chunk(3, dim=1)], 1),
    "hidden states by row, stacked": lambda h, w, b: torch.stack([x @ w.t() for x in h]),
    "hidden states by position": lambda h, w, b: torch.stack([F.linear(h[:, t], w, b) for t in range(h.shape[1])], 1),
    "hidden states that are no pieces": lambda h, w, b: torch.cat([F.linear(h, w), F.linear(h.tanh(), w)])[: len(h)],
    "weights of one": lambda h, w, b: torch.cat([F.linear(h, p) for p in w.split(4)], -1),
    "weights with biases": lambda h, w, b: torch.cat([F.linear(h, p, c) for p, c in zip(w.split(4), b.split(4))], -1),
    "slices of a weight": lambda h, w, b: torch.cat([F.linear(h, w[i : i + 4]).float() for i in (0, 4, 8)], dim=-1),
    "two weights": lambda h, w, b: torch.cat([F.linear(h, w[:3] * 2), F.linear(h, w[3:])], -1),
    "columns of a transposed weight": lambda h, w, b: torch.cat([h @ c for c in w.t().chunk(3, 1)], -1),
    "pieces of the logits by token": lambda h, w, b: torch.cat([z * 0.5 for z in F.linear(h, w).split(2, 1)], 1),
    "pieces of the logits by class": lambda h, w, b: torch.cat([z.float() for z in F.linear(h, w).chunk(3, -1)], -1),
    "rows of the logits": lambda h, w, b: torch.stack(list(F.linear(h, w))),
}  # fmt: skip


@pytest.mark.parametrize("join", WHOLE)
def test_pieces_are_one_product(join: str) -> None:
    def program(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(WHOLE[join](h, w, b).reshape(-1, V), y.view(-1))

    report = right(program, hidden(), weight(), weight(V), labels())
    assert report.after.count("fusedhead.head_loss.default(") == 1
    assert "= torch.cat(" not in report.after or join in ("hidden states that are no pieces", "two weights")


@pytest.mark.parametrize("name", sorted(name for name in SCALES if hasattr(torch, name)))
def test_every_spelling_of_a_scale_is_merged(name: str) -> None:
    op = getattr(torch, name)
    numbers = () if name in NEGATES else (2.0,)

    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        z = torch.cat([op(F.linear(x, w), *numbers) for x in h.chunk(3, 1)], 1)
        return F.cross_entropy(z.view(-1, V), y.view(-1))

    report = right(program, hidden(), weight(), labels())
    assert report.after.count("fusedhead.head_loss.default(") == 1
    assert "= torch.cat(" not in report.after


def test_pieces_of_the_vocabulary_are_swept_one_by_one() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        z = F.linear(h, w).view(-1, V)
        lse = torch.stack([part.logsumexp(-1) for part in z.split(4, -1)]).logsumexp(0)
        return (lse - z.gather(-1, y.view(-1, 1))[:, 0]).mean()

    right(program, hidden(), weight(), labels())


def joined(h: Tensor, w: Tensor) -> Tensor:
    return torch.cat([z.float() for z in F.linear(h, w).split(2, 1)], 1)


def written_afterwards(h: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    z = F.linear(h, w)
    whole = torch.cat(z.split(2, 1), 1)
    whole.mul_(3)
    return F.cross_entropy(whole.view(-1, V), y.view(-1)), z.logsumexp(-1)


def written_before(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    pieces = [F.linear(x, w) for x in h.chunk(3, 1)]
    pieces[1].mul_(3)
    return F.cross_entropy(torch.cat(pieces, 1).view(-1, V), y.view(-1))


def weight_written_between(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    w = w * 1
    with torch.no_grad():
        first = F.linear(h[0], w)
        w.mul_(2)
        return F.cross_entropy(torch.stack([first, F.linear(h[1], w)]).view(-1, V), y.view(-1))


def returned_beside(h: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    z = joined(h, w)
    return F.cross_entropy(z.view(-1, V), y.view(-1)), z


def a_piece_used_beside(h: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    pieces = [F.linear(x, w) for x in h.chunk(3, 1)]
    return F.cross_entropy(torch.cat(pieces, 1).view(-1, V), y.view(-1)), pieces[0].sin().sum()


def in_another_order(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    a, b, c = F.linear(h, w).chunk(3, 1)
    return F.cross_entropy(torch.cat([b, a, c], 1).view(-1, V), y.view(-1))


def one_piece_twice(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    a, *_ = F.linear(h, w).chunk(3, 1)
    return F.cross_entropy(torch.cat([a, a], 1).view(-1, V)[:4], y.view(-1)[:4])


def under_no_grad_in_part(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        first = F.linear(h[0], w)
    return F.cross_entropy(torch.stack([first, F.linear(h[1], w)]).view(-1, V), y.view(-1))


def scaled_in_part(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    a, b = F.linear(h, w)
    return F.cross_entropy(torch.stack([a * 2, b * 3]).view(-1, V), y.view(-1))


@pytest.mark.parametrize(
    "program",
    [
        written_afterwards, written_before, weight_written_between, returned_beside, a_piece_used_beside,
        in_another_order, one_piece_twice, under_no_grad_in_part, scaled_in_part,
    ],
)  # fmt: skip
def test_pieces_with_a_life_of_their_own_come_out_right(program: Callable[..., object]) -> None:
    compiled(program, [hidden(), weight(), labels()])


def test_pieces_under_autocast_are_rounded_as_they_were() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            z = torch.cat([F.linear(x, w) for x in h.split(2)])
        return F.cross_entropy(z.float(), y)

    inputs = hidden(6, D), weight(), labels(6)
    compiled_program = torch.compile(program, backend="fusedhead")
    torch.testing.assert_close(compiled_program(*inputs), program(*inputs), rtol=8e-3, atol=0)
