"""The text that the examples train on is real, the same every time, and made once."""

from __future__ import annotations

from pathlib import Path

import pytest
import text
import torch
from tokenizers import Tokenizer

VOCAB = 400


@pytest.fixture(autouse=True)
def a_small_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    few = [path for path in text.files() if path.parent.name in ("json", "email")]
    monkeypatch.setattr(text, "files", lambda: few)
    monkeypatch.setenv("FUSEDHEAD_EXAMPLES_CACHE", str(tmp_path))
    return few


def test_the_standard_library_is_megabytes_of_sorted_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    result = text.files()
    assert sum(path.stat().st_size for path in result) > 5_000_000
    assert result == text.files()


def test_every_token_is_inside_the_vocabulary() -> None:
    tokens = text.load(VOCAB)
    assert tokens.dtype == torch.int32
    assert tokens.min() >= 0
    assert tokens.max() < VOCAB


def test_tokens_decode_to_the_text_they_came_from(a_small_library: list[Path], tmp_path: Path) -> None:
    tokens = text.load(VOCAB)
    (saved,) = tmp_path.glob("*.json")
    original = "".join(path.read_text(encoding="utf-8") for path in a_small_library)
    assert Tokenizer.from_file(str(saved)).decode(tokens.tolist()) == original


def test_making_the_tokens_again_gives_the_same_ones(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first = text.load(VOCAB).clone()
    monkeypatch.setenv("FUSEDHEAD_EXAMPLES_CACHE", str(tmp_path / "elsewhere"))
    assert torch.equal(first, text.load(VOCAB))


def test_the_second_load_reads_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    first = text.load(VOCAB)
    monkeypatch.setattr(text, "train", lambda *_: pytest.fail("the tokenizer was trained again"))
    assert torch.equal(first, text.load(VOCAB))


def test_a_changed_corpus_is_not_read_from_the_cache(
    monkeypatch: pytest.MonkeyPatch, a_small_library: list[Path]
) -> None:
    first = text.load(VOCAB)
    monkeypatch.setattr(text, "files", lambda: a_small_library[1:])
    assert len(text.load(VOCAB)) < len(first)


def test_targets_are_the_inputs_one_token_later() -> None:
    x, y = text.Batches(torch.arange(1000), batch=4, length=16, seed=0, device=torch.device("cpu")).draw()
    assert x.shape == y.shape == (4, 16)
    assert torch.equal(y, x + 1)


def test_the_seed_fixes_the_batches() -> None:
    def batches(seed: int) -> list[torch.Tensor]:
        source = text.Batches(torch.arange(1000), batch=4, length=16, seed=seed, device=torch.device("cpu"))
        return [source.draw()[0] for _ in range(3)]

    for a, b in zip(batches(1), batches(1)):
        assert torch.equal(a, b)
    assert not torch.equal(batches(1)[0], batches(2)[0])
