"""Token counts that change from call to call: every call is computed as its own size asks, whichever came first.

``FUSEDHEAD_DYNAMIC_EXAMPLES=200 python -m pytest tests/programs/test_dynamic_sizes.py`` looks further.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fusedhead.deferred.tensor import DeferredLogits
from fusedhead.lowering import ops
from fusedhead.lowering.plan.problem import Problem
from tests.eager_stack import Rewritten

D, V, LEAST = 4, 64, 20 * 64  # twenty tokens are fused
OPTIONS = {"fusedhead.min_logits": LEAST}
EXAMPLES = int(os.environ.get("FUSEDHEAD_DYNAMIC_EXAMPLES", "4"))


def mean(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(h, w), y)


def per_token(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(h, w) * 2, y, reduction="none").pow(2).sum()


def entropy(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    logp = F.linear(h, w).log_softmax(-1)
    return -(logp.exp() * logp).sum(-1).mean() + F.nll_loss(logp, y)


def chunks(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return sum(F.cross_entropy(F.linear(a, w), b, reduction="sum") for a, b in zip(h.chunk(2), y.chunk(2)))


def returned(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return F.linear(h, w)


PROGRAMS = (mean, per_token, entropy, chunks)


def operands(tokens: int, seed: int = 0, vocab: int = V) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    h, w = ((torch.randn(n, D, generator=generator) / 2).requires_grad_() for n in (tokens, vocab))
    return h, w, torch.randint(0, vocab, (tokens,), generator=generator)


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, str]]]:
    """(tokens, engine) of every call of a head's op."""
    seen: list[tuple[int, str]] = []
    original = ops._chosen

    def chosen(problem: Problem, *args: Any) -> Any:
        engine, windows = original(problem, *args)
        seen.append((problem.tokens, engine.name))
        return engine, windows

    monkeypatch.setattr(ops, "_chosen", chosen)
    return seen


def same(program: Callable[..., Tensor], rewritten: Rewritten, tokens: int, train: bool, mark: bool) -> None:
    """One call, and its gradients, compared with eager code."""
    mine, plain = operands(tokens, tokens), operands(tokens, tokens)
    if mark:
        torch._dynamo.mark_dynamic(mine[0], 0)
        torch._dynamo.mark_dynamic(mine[2], 0)
    with torch.set_grad_enabled(train):
        got, expected = rewritten(*mine), program(*plain)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    if train:
        for a, b in zip(torch.autograd.grad(got, mine[:2]), torch.autograd.grad(expected, plain[:2])):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("how", ["automatic", "marked", "dynamic"])
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=True,
    database=None,
    phases=[Phase.generate],
)
@given(data=st.data())
def test_every_call_is_computed_by_its_own_size(how: str, engines: list[tuple[int, str]], data: st.DataObject) -> None:
    program = data.draw(st.sampled_from(PROGRAMS))
    size = st.integers(2, 19) | st.integers(20, 70)
    calls = data.draw(st.lists(size, min_size=3, max_size=5, unique=True))
    train = data.draw(st.booleans())
    torch.compiler.reset()
    engines.clear()
    weight = torch.nn.Parameter(operands(2)[1].detach())

    def of_a_module(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return program(h, weight, y) + w.sum()

    fn = of_a_module if how == "dynamic" else program  # an argument's sizes are symbols there, a parameter's never
    compiled = Rewritten(fn, OPTIONS, dynamic=True if how == "dynamic" else None)
    for tokens in calls:
        same(fn, compiled, tokens, train, how == "marked")
    # the first call of automatic dynamic shapes is compiled for its size alone, and left if that is small
    fused = [n for n in calls if how != "automatic" or n != calls[0] or n * V >= LEAST]
    for tokens, engine in engines:
        least = LEAST if tokens in calls else LEAST // 2  # a chunk
        assert engine == ("torch windows" if tokens * V >= least else "torch whole"), tokens
    assert len(engines) >= len(fused)
    assert any(head.fused for head in compiled.report.heads)


def test_a_size_that_can_never_be_large_is_left_and_the_sentence_says_so() -> None:
    compiled = Rewritten(mean, OPTIONS)
    h, w, y = operands(8)
    for t in (h, y):
        torch._dynamo.mark_dynamic(t, 0, min=2, max=19)
    compiled(h, w, y)
    (head,) = compiled.report.heads
    assert not head.fused
    assert "1,216 logits are too few" in head.reason


def test_no_guard_is_added_on_the_number_of_tokens() -> None:
    compiled = Rewritten(mean, OPTIONS)
    for tokens in (9, 8, 70, 5, 500, 2):
        same(mean, compiled, tokens, True, True)
    assert compiled.report.graphs == 1
    assert [head.fused for head in compiled.report.heads] == [True]


@pytest.mark.parametrize("how", ["automatic", "marked"])
def test_returned_logits_are_deferred_in_the_calls_that_are_large(how: str) -> None:
    compiled = Rewritten(returned, {"fusedhead.min_logits": 20 * 1024})
    for tokens in (9, 8, 70, 5, 2048, 20):
        h, w, y = operands(tokens, vocab=1024)
        if how == "marked":
            torch._dynamo.mark_dynamic(h, 0)
        z = compiled(h, w, y)
        assert isinstance(z, DeferredLogits) == (tokens >= 20)
        loss, expected = F.cross_entropy(z, y), mean(h, w, y)
        torch.testing.assert_close(loss, expected)
        for a, b in zip(torch.autograd.grad(loss, (h, w)), torch.autograd.grad(expected, (h, w))):
            torch.testing.assert_close(a, b)
    assert compiled.report.graphs == (2 if how == "automatic" else 1)


def test_logits_without_gradients_are_deferred_where_tokens_are_many() -> None:
    compiled = Rewritten(returned, {"fusedhead.min_logits": 20 * 1024})
    with torch.no_grad():
        for tokens in (9, 8, 70, 20, 64):
            h, w, y = operands(tokens, vocab=1024)
            z = compiled(h, w, y)
            assert isinstance(z, DeferredLogits) == (tokens >= 64)
            torch.testing.assert_close(z + 0, F.linear(h, w))
