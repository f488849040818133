"""Logits that losses read along the classes and along the tokens (CLIP): two heads, or one product as it was."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.eager_stack import Rewritten
from tests.programs.claims import compiled, right

N, D = 24, 8


def image() -> Tensor:
    return torch.randn(N, D, requires_grad=True)


def scale() -> Tensor:
    return torch.tensor(0.3, requires_grad=True)


def both(z: Tensor, turned: Tensor) -> Tensor:
    y = torch.arange(N)
    return (F.cross_entropy(z, y) + F.cross_entropy(turned, y)) / 2


Program = Callable[[Tensor, Tensor, Tensor], Tensor]


def openai(a: Tensor, b: Tensor, s: Tensor) -> Tensor:
    z = s.exp() * a @ b.t()
    return both(z, z.t())


def hugging_face(a: Tensor, b: Tensor, s: Tensor) -> Tensor:
    z = torch.matmul(b, a.t()) * s.exp()
    return both(z, z.T.contiguous())


def linear_and_cast(a: Tensor, b: Tensor, s: Tensor) -> Tensor:
    z = F.linear(a, b).float() / s
    return both(z, z.transpose(0, 1) * 2)


def turned_alone(a: Tensor, b: Tensor, s: Tensor) -> Tensor:
    return F.cross_entropy((a @ b.t()).permute(1, 0) + s, torch.arange(N))


def autocast(a: Tensor, b: Tensor, s: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        z = a @ b.t()
        return both(z.float(), z.float().mT)


@pytest.mark.parametrize("program", [openai, hugging_face, linear_and_cast])
def test_losses_in_both_directions_are_two_heads(program: Program) -> None:
    report = right(program, image(), image(), scale(), fused=2)
    assert [head.logits for head in report.heads] == ["never built"] * 2
    assert "aten.mm" not in report.after


def test_a_loss_along_the_tokens_is_a_head() -> None:
    right(turned_alone, image(), image(), scale())


def test_in_both_directions_autocast_rounds_less_than_eager_code() -> None:
    inputs = image(), image(), scale()
    truth = openai(*(x.bfloat16().double() for x in inputs[:2]), torch.zeros((), dtype=torch.float64))
    rewritten = Rewritten(autocast)
    ours, theirs = rewritten(*inputs), autocast(*inputs)
    assert sum(head.fused for head in rewritten.report.heads) == 2
    assert abs(ours - truth) <= abs(theirs - truth) + 1e-6


def also_read(a: Tensor, b: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    z = a @ b.t()
    return both(z, z.t()), z.cumsum(0)


def written(a: Tensor, b: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    z = a @ b.t()
    turned = z.t()
    turned.mul_(s)
    return both(z, turned), s


@pytest.mark.parametrize("program", [also_read, written])
def test_one_product_stays_one_where_its_logits_are_built_anyway(program: Program) -> None:
    report = compiled(program, (image(), image(), scale()))
    assert "aten.mm" not in report.after


def test_both_directions_too_small_to_profit_stay_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEDHEAD_MIN_LOGITS", str(N * N + 1))
    report = compiled(openai, (image(), image(), scale()))
    assert report.after == report.before
