"""Stacked heads whose logits a compiled model returns, the loss outside: MusicGen and its kin.

Each loss is one of its own head, whatever the stack is spelled like, and no tensor of the stack's size is made.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedhead.report.report import Report
from tests.deferred.heads import D, Operations, V, deferring, is_deferred

BOOKS, B, T = 3, 4, 8
Y = torch.randint(0, V, (B, BOOKS, T), generator=torch.Generator().manual_seed(2))


class Codebooks(nn.Module):
    def __init__(self, stack: Callable[[Codebooks, Tensor], Tensor]) -> None:
        super().__init__()
        self.mix = nn.Linear(D, D)
        self.heads = nn.ModuleList([nn.Linear(D, V, bias=False) for _ in range(BOOKS)])
        self.biased = nn.ModuleList([nn.Linear(D, V) for _ in range(BOOKS)])
        self.together = nn.Parameter(torch.randn(BOOKS * V, D) * 0.3)
        self.apart = nn.Parameter(torch.randn(BOOKS, V, D) * 0.3)
        self.stack = stack

    def forward(self, x: Tensor) -> Tensor:
        return self.stack(self, torch.tanh(self.mix(x)))


def stacked(dim: int) -> Callable[[Codebooks, Tensor], Tensor]:
    return lambda m, h: torch.stack([head(h) for head in m.heads], dim)


def by_index(dim: int) -> Callable[[Tensor], list[Tensor]]:
    return lambda z: [z[(slice(None),) * dim + (k,)] for k in range(BOOKS)]


def regrouped(m: Codebooks, h: Tensor) -> Tensor:
    """What transformers' MusicGen returns."""
    z = stacked(1)(m, h)
    return z.reshape(-1, *z.shape[2:])


FORMS: dict[str, tuple[Callable[[Codebooks, Tensor], Tensor], Callable[[Tensor], list[Tensor]]]] = {
    "stack, by index": (stacked(1), by_index(1)),
    "stack, unbound": (stacked(1), lambda z: list(z.unbind(1))),
    "stack, iterated": (stacked(0), list),
    "stack, numbered before the classes": (stacked(2), by_index(2)),
    "stack, selected": (stacked(-2), lambda z: [z.select(-2, k) for k in range(BOOKS)]),
    "with biases": (lambda m, h: torch.stack([head(h) for head in m.biased], 1), by_index(1)),
    "pieces of one weight": (lambda m, h: F.linear(h, m.together).view(B, T, BOOKS, V), by_index(2)),
    "einsum": (lambda m, h: torch.einsum("btd,kvd->bktv", h, m.apart), by_index(1)),
    "slices of one weight": (lambda m, h: torch.stack([F.linear(h, m.apart[k]) for k in range(BOOKS)], 1), by_index(1)),
    "regrouped and back": (regrouped, lambda z: by_index(1)(z.view(B, BOOKS, -1, V))),
}


def by_head(parts: list[Tensor]) -> Tensor:
    return sum(F.cross_entropy(z.reshape(-1, V), Y[:, k].reshape(-1)) for k, z in enumerate(parts)) / BOOKS


def step(model: nn.Module, loss: Tensor) -> list[Tensor | None]:
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)]


def alike(form: Callable[[Codebooks, Tensor], Tensor], loss: Callable[[Tensor], Tensor]) -> Operations:
    model, x, report = Codebooks(form), torch.randn(B, T, D), Report()
    wanted = step(model, loss(model(x)))
    z = deferring(model, report)(x)
    assert is_deferred(z)
    with Operations(B * T) as ran:
        actual = step(model, loss(z))
    torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-6)
    assert [head.fused for head in report.heads] == [True] * BOOKS
    assert {head.logits for head in report.heads} == {"deferred"}
    return ran


@pytest.mark.parametrize("form", FORMS)
def test_a_loss_of_one_head_is_a_sweep_of_that_head(form: str) -> None:
    stack, parts = FORMS[form]
    ran = alike(stack, lambda z: by_head(parts(z)))
    assert not ran.large
    assert len([name for name in ran.fused if not name.endswith("backward")]) == BOOKS


@pytest.mark.parametrize("form", FORMS)
def test_the_report_has_a_line_a_head_with_its_sizes_its_price_and_what_was_asked_of_it(form: str) -> None:
    stack, parts = FORMS[form]
    report = Report()
    z = deferring(Codebooks(stack), report)(torch.randn(B, T, D))
    by_head(parts(z)[:2]).backward()
    assert [(head.tokens, head.hidden_size, head.vocab_size) for head in report.heads] == [(B * T, D, V)] * BOOKS
    assert all(head.workspace_bytes > 0 and head.bytes_logits == B * T * V * 4 for head in report.heads)
    of_one_weight = form in ("pieces of one weight", "einsum", "slices of one weight")  # heads told apart by weights
    assert [head.run.answered.value for head in report.heads] == ([2, 2, 2] if of_one_weight else [1, 1, 0])


def test_one_loss_of_all_heads_is_a_sweep_each() -> None:
    ran = alike(stacked(1), lambda z: F.cross_entropy(z.reshape(-1, V), Y.reshape(-1)))
    assert not ran.large
    assert len([name for name in ran.fused if not name.endswith("backward")]) == BOOKS


def test_labels_shifted_before_the_heads_are_told_apart() -> None:
    def loss(z: Tensor) -> Tensor:
        return sum(F.cross_entropy(z[:, k].flatten(0, 1), Y[:, k, 1:].flatten()) for k in range(BOOKS))

    assert not alike(lambda m, h: stacked(1)(m, h)[:, :, :-1], loss).large


def test_any_other_use_gets_the_stack() -> None:
    alike(stacked(1), lambda z: z.sin().mean() + z[:, 1].std())


def changed_later(m: Codebooks, h: Tensor) -> Tensor:
    z = stacked(1)(m, h)
    z[:, 0].mul_(2)
    return z


def written_hidden(m: Codebooks, h: Tensor) -> Tensor:
    z = stacked(1)(m, h.detach())
    h.detach().mul_(0)
    return z


@pytest.mark.parametrize("stack", [changed_later, written_hidden])
def test_a_stack_that_is_written_to_or_whose_operands_are_stays(stack: Callable[[Codebooks, Tensor], Tensor]) -> None:
    model, x = Codebooks(stack), torch.randn(B, T, D)
    torch.testing.assert_close(deferring(model)(x).sum(), model(x).sum())
