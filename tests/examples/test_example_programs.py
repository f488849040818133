"""The examples that need nothing but torch learn what they should, small, and have their heads fused.

Graphs are rewritten by the pass and executed as they are, so that a program costs a second; `make e2e` runs them as a
user does. What they print last is the report, and it must say what their docstrings promise.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest
import torch

from fusedhead import backend
from tests.eager_stack import as_it_is
from tests.functional.ranks import on_ranks

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


@pytest.fixture(autouse=True)
def executed_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "Inductor", lambda *_: as_it_is)


SMALL = {
    "classifier": "--classes 500 --batch 64 --steps 12",
    "distill": "--vocab 500 --tokens 64 --steps 6",
    "sasrec": "--items 500 --batch 16 --length 24 --steps 12",
}


SMALL_EVALUATION = "--vocab 4096 --width 32 --batch 4 --length 64 --steps 8"


@pytest.mark.parametrize("name", SMALL)
def test_an_example_learns_on_fused_heads_what_eager_code_learns(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    small, module = [*SMALL[name].split(), "--device", "cpu"], import_module(name)
    losses = module.main(small)
    said = capsys.readouterr().out
    assert losses[-1] < losses[0]
    assert ", 0 left" in said
    assert "0 heads fused" not in said
    assert "never built" in said
    torch.testing.assert_close(losses, module.main([*small, "--backend", "eager"]), rtol=2e-4, atol=0)


def test_the_evaluation_learns_and_counts_as_eager_code_does(capsys: pytest.CaptureFixture[str]) -> None:
    evaluate = import_module("evaluate")
    small = [*SMALL_EVALUATION.split(), "--device", "cpu"]
    (before, after), eager = evaluate.main(small), evaluate.main([*small, "--backend", "eager"])
    assert after["perplexity"] < before["perplexity"]
    assert before["top-1"] <= before["top-5"] < after["top-5"]
    for ours, theirs in zip((before, after), eager):
        assert ours == pytest.approx(theirs, rel=2e-3)
    assert "deferred, never built" in capsys.readouterr().out


def test_fsdp2_on_two_processes_learns_on_a_fused_head_what_plain_code_learns() -> None:
    """`make e2e` runs it under torchrun."""
    (losses, said), (others, nothing) = on_ranks("tests.examples.fsdp2_small:train", 2)
    assert losses == others == pytest.approx(plain_losses(300, 16, 3), abs=2e-4)
    assert "1 head fused, 0 left" in said
    assert said.startswith("loss ")
    assert not nothing


def plain_losses(vocab: int, length: int, steps: int) -> list[float]:
    """What the example computes, on one process without FSDP and without a compiler."""
    torch.manual_seed(0)
    model = import_module("fsdp2").Language(vocab)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    tokens = torch.randint(vocab, (8, length + 1))
    for _ in range(steps):
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.py")))
def test_an_example_says_what_one_sees_and_fits_on_some_screens(name: str) -> None:
    text = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    assert text.startswith('"""')
    assert len(text.splitlines()) < 400
