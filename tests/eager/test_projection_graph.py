"""The graph of an eager projection: threads share one, and errors, options and weights are those of each call."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusedhead
from fusedhead.eager import heads
from fusedhead.report.summary import Summary
from tests.eager.models import D, Model, V, batch, same, step


def test_functional_call_takes_other_weights(summary: Summary) -> None:
    model, (x, y) = Model(), batch()
    fusedhead.defer(model)
    weights = {name: torch.randn_like(p).requires_grad_() for name, p in model.named_parameters()}
    loss = F.cross_entropy(torch.func.functional_call(model, weights, (x,)).flatten(0, 1), y.flatten())
    grads = torch.autograd.grad(loss, list(weights.values()))
    other = Model()
    other.load_state_dict(weights)
    same([loss.detach(), *grads], step(other, x, y), step(copy.deepcopy(other).double(), x, y))
    assert summary.heads()[0].run.answered.value == 1


def test_a_weight_that_is_computed_is_computed_once_a_call() -> None:
    head = nn.utils.parametrizations.spectral_norm(nn.Linear(D, V, bias=False))
    other, h, y = copy.deepcopy(head), torch.randn(64, D), torch.randint(0, V, (64,))
    heads.HEADS[head] = heads.EagerHead("head")
    heads.install()
    for _ in range(3):
        ours, plain = F.cross_entropy(head(h), y), F.cross_entropy(F.linear(h, other.weight), y)
        torch.testing.assert_close(ours, plain)


def test_errors_are_eager_codes_own() -> None:
    model = Model()
    fusedhead.defer(model)
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        model.lm_head(torch.randn(64, D + 1))
    with pytest.raises(RuntimeError, match="same dtype"):
        model.lm_head(torch.randn(64, D).double())


def test_threads_share_one_graph(summary: Summary) -> None:
    model, (x, y) = Model(), batch()
    fusedhead.defer(model)
    gate = threading.Barrier(4)

    def run() -> None:
        gate.wait()
        F.cross_entropy(model(x).flatten(0, 1), y.flatten())

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (summary.graphs, summary.heads()[0].run.answered.value) == (1, 4)


def test_options_are_read_at_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (x, _) = Model(), batch()
    fusedhead.defer(model)
    monkeypatch.setenv("FUSEDHEAD_MIN_LOGITS", "auto")
    assert type(model(x)) is Tensor
    monkeypatch.setenv("FUSEDHEAD_MIN_LOGITS", "0")
    monkeypatch.setenv("FUSEDHEAD_LOGITS", "eager")
    assert type(model(x)) is Tensor
