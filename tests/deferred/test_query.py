"""Queries of deferred logits: what the caller computes beside a loss, in which mode, and which errors it gets."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.deferred.heads import B, Model, Operations, T, V, deferring, tokens
from tests.deferred.outside_losses import IN_THE_FORWARD, flattened


def test_loglikelihoods_and_greedy_matches_of_an_evaluation() -> None:
    """As lm-evaluation-harness: log_softmax of the batch, then a piece of each row."""
    model, x = Model(), tokens(8, 9)

    def answers(z: Tensor) -> list[tuple[float, bool]]:
        actual = []
        for row, continuation, length in zip(F.log_softmax(z, dim=-1), x, (2, 3, 1, 2, 4, 2, 3, 2)):
            row, wanted = row[8 - length : 8].unsqueeze(0), continuation[-length:].unsqueeze(0)
            greedy = row.argmax(dim=-1)
            chosen = torch.gather(row, 2, wanted.unsqueeze(-1)).squeeze(-1)
            actual.append((float(chosen.sum()), bool((greedy == wanted).all())))
        return actual

    with torch.no_grad():
        expected = answers(model(x))
        z = deferring(model)(x)
        with Operations(1) as ran:
            got = answers(z)
    assert [g for _, g in got] == [g for _, g in expected]
    torch.testing.assert_close(torch.tensor([v for v, _ in got]), torch.tensor([v for v, _ in expected]))
    assert ran.fused == ["head_stats"] * 16
    assert ran.large == []


def test_ambient_autocast_means_what_it_means_in_eager_code() -> None:
    model, x = Model(), tokens()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        eager = flattened(model(x))
        z = deferring(model)(x)
        with Operations() as ran:
            fused = flattened(z)
    assert (z.dtype, fused.dtype) == (torch.bfloat16, eager.dtype)
    torch.testing.assert_close(fused, eager, atol=5e-3, rtol=0)
    assert (ran.fused, ran.large) == (IN_THE_FORWARD, [])


def test_an_all_ignored_mean_is_nan() -> None:
    z = deferring(Model())(tokens())
    assert F.cross_entropy(z.view(-1, V), torch.full((B * T,), -100)).isnan()


def test_a_label_out_of_range_raises_as_in_eager_code() -> None:
    z = deferring(Model())(tokens())
    with pytest.raises(IndexError, match="1024 is out of"):
        F.cross_entropy(z.view(-1, V), torch.full((B * T,), V))


def test_other_numbers_of_tokens_are_not_learnt_again(caplog: pytest.LogCaptureFixture) -> None:
    from fusedhead.deferred import query as deferred_request

    model, readings = Model(), []
    original = deferred_request.read_call
    compiled = deferring(model, dynamic=True)

    def counted(*args: object) -> object:
        readings.append(args)
        return original(*args)

    deferred_request.read_call = counted
    try:
        for rows, length in ((2, 6), (3, 7), (5, 11), (4, 9), (3, 8)):
            x = tokens(rows, length)
            z, y = compiled(x), tokens(rows, length)
            expected = model(x)
            for logits in (z, expected):
                shift = logits[..., :-1, :].contiguous().view(-1, V)
                actual = F.cross_entropy(shift, y[..., 1:].reshape(-1))
                logits_loss = actual if logits is z else logits_loss  # noqa: F821
            torch.testing.assert_close(logits_loss, actual)
    finally:
        deferred_request.read_call = original
    assert len(readings) <= 2
