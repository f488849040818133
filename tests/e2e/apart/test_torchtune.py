"""torchtune: the loss that its recipes compile with the backend named in TORCH_COMPILE_BACKEND; its distillation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torchtune.models.llama3 import llama3
from torchtune.modules.loss import CEWithChunkedOutputLoss, SymmetricKLLoss
from torchtune.training import compile_loss, compile_model

from tests.e2e.comparison import Trained, check, weights
from tests.e2e.text import VOCAB, tokens


def small() -> Any:
    return llama3(vocab_size=VOCAB, num_layers=1, num_heads=2, num_kv_heads=2, embed_dim=64, max_seq_len=64)


@pytest.mark.parametrize("backend", [None, "fusedhead"])
def test_a_recipes_loss(backend: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head runs eagerly, in chunks, between compiled layers and the compiled loss: its logits are never built."""

    def program(compiled: bool) -> Trained:
        from fusedhead import changes

        if backend is not None and changes():
            monkeypatch.setenv("TORCH_COMPILE_BACKEND", backend)
        model = small()
        loss = CEWithChunkedOutputLoss(num_output_chunks=4)
        model.set_num_output_chunks(loss.num_output_chunks)
        if compiled:
            compile_model(model, verbose=False)
            loss = compile_loss(loss, verbose=False)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        before, logged = weights(model), {}
        for step, batch in enumerate(tokens(3, 4, 33)):
            value = loss(model(batch[:, :-1]), batch[:, 1:])
            value.backward()
            optimizer.step()
            optimizer.zero_grad()
            logged[f"loss {step}"] = float(value)
        return Trained(logged, before, weights(model))

    fused = check(program, heads=2)  # the line of the model that hands out deferred logits, and the loss of them
    assert {head.computes for head in fused.heads if head.logits != "deferred"} == {
        "cross_entropy(sum, ignore_index=-100)"
    }
    assert sum(head.run.built.total for head in fused.heads) == 0


def test_distillation() -> None:
    """Both divergences between a student and a teacher, of logits that two compiled models return."""

    def program(compiled: bool) -> Trained:
        student, teacher = small(), small()
        loss = SymmetricKLLoss()
        run, known = (torch.compile(student), torch.compile(teacher)) if compiled else (student, teacher)
        optimizer = torch.optim.AdamW(student.parameters(), 1e-3)
        before, logged = weights(student), {}
        for step, batch in enumerate(tokens(3, 4, 33)):
            with torch.no_grad():
                targets = known(batch[:, :-1]).reshape(-1, VOCAB)
            value = loss(run(batch[:, :-1]).reshape(-1, VOCAB), targets, batch[:, 1:])
            value.backward()
            optimizer.step()
            optimizer.zero_grad()
            logged[f"loss {step}"] = float(value)
        return Trained(logged, before, weights(student))

    fused = check(program, heads=1)  # one line of the model, which both run
    assert {head.logits for head in fused.heads} == {"deferred"}
