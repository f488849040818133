"""Deferring a model's tied head: scopes of threads and methods, errors, and models that need no mode."""

from __future__ import annotations

import inspect
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusedhead
from fusedhead.deferred.tensor import DeferredLogits
from fusedhead.eager import tied_heads
from fusedhead.report.summary import Summary
from tests.eager.models import D, V, batch
from tests.eager.tied import Tied


def test_the_mode_is_on_in_methods_of_this_model_alone() -> None:
    one, other, (x, _) = Tied(), Tied(), batch()
    fusedhead.defer(one)
    seen: list[Any] = []
    other.mix.register_forward_hook(lambda *_: seen.append(torch.overrides._get_current_function_mode_stack()))
    assert type(other(x)) is Tensor
    assert type(one(x)) is DeferredLogits
    assert seen == [[]]
    assert type(F.linear(torch.randn(64, D), one.embed.weight)) is Tensor
    assert type(one.embed.weight) is nn.Parameter


class Scripted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, D)

    def forward(self, h: Tensor) -> Tensor:
        return F.linear(h, self.embed.weight)


def test_a_script_is_made_of_the_models_own_text() -> None:
    model, h = Scripted(), torch.randn(64, D)
    expected, signature = model(h), inspect.signature(model.forward)
    fusedhead.defer(model)
    assert inspect.signature(model.forward) == signature
    assert "self.embed.weight" in inspect.getsource(Scripted.forward)
    actual = torch.jit.script(model)(h)
    assert type(actual) is Tensor
    torch.testing.assert_close(actual, expected)


def test_threads_have_scopes_of_their_own(summary: Summary) -> None:
    model, (x, y) = Tied(), batch()
    expected = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
    fusedhead.defer(model)
    gate, losses = threading.Barrier(4), []

    def run() -> None:
        gate.wait()
        losses.append(F.cross_entropy(model(x).flatten(0, 1), y.flatten()).detach())

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for loss in losses:
        torch.testing.assert_close(loss, expected.detach())
    assert (summary.graphs, summary.heads()[0].run.answered.value) == (1, 4)


def test_an_error_in_a_method_leaves_no_mode_behind() -> None:
    model = Tied()
    fusedhead.defer(model)
    with pytest.raises(IndexError):
        model(torch.full((4, 32), V))
    assert torch.overrides._get_current_function_mode_stack() == []


def test_a_model_with_layers_that_are_heads_runs_under_no_mode() -> None:
    class Untied(Tied):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(D, V)

    model = Untied()
    fusedhead.defer(model)
    assert model not in tied_heads.MODELS


def test_an_embedding_of_whose_sizes_no_head_was_met_is_told_of() -> None:
    Tied()
    assert tied_heads.embedding_note([]) == ""  # made before anybody looked
    end = tied_heads.watch_tables()
    try:
        model = Tied()
        nn.Embedding(512, D)
        said = tied_heads.embedding_note([])
        assert said.startswith(f"an embedding of 1,024 x {D} was made, and no head of these sizes was met")
        assert "fusedhead.defer(model)" in said
        assert tied_heads.embedding_note([(V, D)]) == ""
        assert type(model.embed.weight) is nn.Parameter
    finally:
        end()
    assert tied_heads.embedding_note([]) == ""
    Tied()
    assert tied_heads.embedding_note([]) == ""
