"""Loops over rows, or over pieces of the tokens, that Dynamo has unrolled: one sweep for all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph

from fusedhead.analysis.body import Body
from fusedhead.canonicalize import functionalize_accumulation
from fusedhead.options import Options
from tests.programs.claims import B, D, T, V, compiled, hidden, labels, right, weight

Program = Callable[[Tensor, Tensor, Tensor], Tensor]


def summed(pieces: Iterable[tuple[Tensor, Tensor]], reduction: str = "mean") -> Tensor:
    total = torch.zeros([])
    for z, y in pieces:
        total += F.cross_entropy(z.reshape(-1, V), y.reshape(-1), reduction=reduction)
    return total


def flat(h: Tensor, w: Tensor) -> Tensor:
    return F.linear(h, w).view(-1, V)


def log_probs_row_by_row(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    rows = []
    for z, labels_of_row in zip(F.linear(h, w), y):
        rows.append(z.log_softmax(-1).gather(-1, labels_of_row.unsqueeze(-1)).squeeze(-1))
    return torch.stack(rows)


ONE_SWEEP: dict[str, Program] = {
    "rows by number": lambda h, w, y: sum(F.cross_entropy(F.linear(h, w)[i], y[i]) for i in range(1)) + summed(
        (lambda z: [(z[i], y[i]) for i in range(B)])(F.linear(h, w))
    ),
    "rows": lambda h, w, y: summed(zip(F.linear(h, w), y)) / B,
    "rows of different lengths": lambda h, w, y: summed(
        (z[: 2 + i], x[: 2 + i]) for i, (z, x) in enumerate(zip(F.linear(h, w), y))
    ),
    "positions": lambda h, w, y: summed(zip(F.linear(h, w).unbind(1), y.unbind(1))),
    "stacked": lambda h, w, y: torch.stack([F.cross_entropy(z, x) for z, x in zip(F.linear(h, w), y)]).mean(),
    "pieces": lambda h, w, y: summed(zip(flat(h, w).split(3), y.view(-1).split(3)), "sum") / y.numel(),
    "joined losses": lambda h, w, y: torch.cat(
        [F.cross_entropy(z.float(), x, reduction="none") for z, x in zip(flat(h, w).split(3), y.view(-1).split(3))]
    ).mean(),
    "a head for every piece": lambda h, w, y: summed(
        ((F.linear(piece, w), x) for piece, x in zip(h.chunk(3, 1), y.chunk(3, 1))), "sum"
    ) / y.numel(),
    "a head for every piece, capped": lambda h, w, y: summed(
        (5 * torch.tanh(F.linear(x, w).float() / 5), of) for x, of in zip(h.view(-1, D).split(4), y.view(-1).split(4))
    ),
    "several labels": lambda h, w, y: sum(
        F.cross_entropy(F.linear(h * (k + 1), w).transpose(1, 2), y.roll(-k, 1)) / (k + 1) for k in range(3)
    ),
}  # fmt: skip


def sweeps(text: str) -> int:
    return sum(text.count(f"torch.ops.fusedhead.{op}.default(") for op in ("head_stats", "head_loss"))


# a reshape in whose symbolic sizes PyTorch itself does not recognise the vocabulary
OBSCURE = "a head for every piece"


@pytest.mark.parametrize(
    ("spelling", "dynamic"),
    [(spelling, d) for spelling in ONE_SWEEP for d in (None, True) if (spelling, d) != (OBSCURE, True)],
)
def test_a_loop_is_one_sweep_that_takes_its_gradients(spelling: str, dynamic: bool | None) -> None:
    w = weight()

    def program(h: Tensor, y: Tensor) -> Tensor:
        return ONE_SWEEP[spelling](h, w, y)

    heads = {"a head for every piece": 3, "a head for every piece, capped": 3, "several labels": 3, "rows by number": 2}
    report = right(program, hidden(), labels(), fused=heads.get(spelling, 1), dynamic=dynamic)
    assert sweeps(report.after) == 1
    assert "head_loss" in report.after


def test_losses_of_every_row_are_one_sweep() -> None:
    report = right(log_probs_row_by_row, hidden(), weight(), labels())
    assert sweeps(report.after) == 1


def test_an_entropy_beside_the_losses_is_a_sweep_of_its_own() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        total = torch.zeros([])
        for z, x in zip(F.linear(h, w), y):
            lp = z.log_softmax(-1)
            total += F.cross_entropy(z, x) - 0.1 * (lp.exp() * lp).sum(-1).mean()
        return total

    assert sweeps(right(program, hidden(), weight(), labels()).after) <= 2


def test_rows_have_vectors_of_their_own() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor, t: Tensor) -> Tensor:
        return summed((F.linear(row, w) / temperature[:, None], x) for row, x, temperature in zip(h, y, t))

    report = right(program, hidden(), weight(), labels(), (torch.rand(B, T) + 0.5).requires_grad_(), fused=B)
    assert sweeps(report.after) == 1


def test_a_z_loss_of_every_piece_keeps_its_sweep() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        pieces = zip(F.linear(h, w), y)
        return torch.stack([F.cross_entropy(z, x) + 0.1 * z.logsumexp(-1).square().mean() for z, x in pieces]).sum()

    report = right(program, hidden(), weight(), labels())
    assert report.after.count("fusedhead.head_loss.default(") == B


@pytest.mark.parametrize("between", ["labels", "hidden states", "weight"])
def test_what_is_written_between_two_pieces_keeps_them_apart(between: str) -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        h, w, y = h * 1, w * 1, y.clone()
        with torch.no_grad():
            first = F.cross_entropy(F.linear(h[0], w), y[0])
        written = {"labels": y, "hidden states": h, "weight": w}[between]
        written.mul_(0)
        return first, F.cross_entropy(F.linear(h[1], w), y[1])

    compiled(program, [hidden(), weight(), labels()])


def test_a_loss_that_the_next_piece_reads_keeps_them_apart() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        first = F.cross_entropy(F.linear(h[0], w), y[0])
        return first + F.cross_entropy(F.linear(h[1] * first.detach(), w), y[1])

    assert sweeps(right(program, hidden(), weight(), labels(), fused=2).after) == 2


def test_pieces_with_and_without_gradients_keep_apart() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        first = F.cross_entropy(F.linear(h[0], w), y[0])
        with torch.no_grad():
            second = F.cross_entropy(F.linear(h[1], w), y[1])
        return first, second + F.cross_entropy(F.linear(h[1].detach(), w), y[1])

    assert sweeps(right(program, hidden(), weight(), labels(), fused=3).after) == 3


def test_only_a_sum_that_nothing_else_sees_stops_being_written() -> None:
    def graph_of(program: Callable[..., object], *inputs: Tensor) -> Graph:
        graphs: list[Graph] = []
        torch.compile(program, backend=lambda gm, _: graphs.append(gm.graph) or gm.forward)(*inputs)
        functionalize_accumulation.run(Body(graphs[0], Options()))
        return graphs[0]

    def written(graph: Graph) -> int:
        return sum(node.op == "call_function" and node.target.__name__ == "iadd" for node in graph.nodes)

    def seen(x: Tensor) -> tuple[Tensor, Tensor]:
        total = x.sum()
        view = total.view(1)
        total += 1
        return total, view

    def mixed(x: Tensor) -> Tensor:
        total = x.int().sum()
        total += 1
        return total

    def of_an_input(total: Tensor) -> Tensor:
        total += 1
        return total * 2

    x = torch.randn(3)
    assert written(graph_of(seen, x)) == 1
    assert written(graph_of(of_an_input, torch.zeros([]))) == 1
    assert written(graph_of(mixed, x)) == 0
