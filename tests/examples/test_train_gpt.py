"""The training example trains, repeats itself under one seed, and knows nothing of the backend it runs on."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import gpt
import pytest
import text
import torch
import train_gpt

import fusedhead

VOCAB = 300
TOKENS = (torch.arange(4096, dtype=torch.int32) * 7) % VOCAB  # the next token follows from the last


def run(options: str) -> train_gpt.Measurements:
    tiny = f"--model tiny --vocab {VOCAB} --batch 2 --length 16 --steps 3 --device cpu --backend eager "
    return train_gpt.train(train_gpt.arguments((tiny + options).split()), TOKENS)


def test_the_model_says_nothing_of_compilers() -> None:
    source = Path(gpt.__file__).read_text()
    for word in ("fusedhead", "compile(", "inductor", "backend"):
        assert word not in source


def test_models_named_by_their_size_have_it() -> None:
    with torch.device("meta"):
        for name, size in gpt.SIZES.items():
            if name.endswith("M"):
                model = gpt.GPT(size)
                parameters = sum(p.numel() for p in model.parameters()) - model.positions.weight.numel()
                assert parameters == pytest.approx(int(name[:-1]) * 1e6, rel=0.02)


def test_the_head_and_the_embedding_are_one_parameter() -> None:
    model = gpt.GPT(gpt.SIZES["tiny"])
    assert model.head.weight is model.tokens.weight


def test_an_untrained_model_is_about_as_good_as_guessing() -> None:
    assert run("--steps 1").losses[0] == pytest.approx(torch.tensor(VOCAB).log().item(), abs=0.1)


def test_training_lowers_the_loss() -> None:
    losses = run("--steps 30 --lr 0.01 --batch 8").losses
    assert losses[-1] < losses[0] - 0.3


def test_one_seed_gives_one_curve_and_another_another() -> None:
    assert run("--seed 1").losses == run("--seed 1").losses
    assert run("--seed 1").losses != run("--seed 2").losses


def test_two_micro_batches_are_one_batch_of_twice_the_size() -> None:
    torch.testing.assert_close(run("--batch 2 --grad-accum 2").losses, run("--batch 4").losses)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_autocast_trains_to_about_the_same_losses(dtype: str) -> None:
    torch.testing.assert_close(run(f"--dtype {dtype}").losses, run("").losses, atol=0.02, rtol=0)


def test_the_learning_rate_rises_and_falls_to_a_tenth() -> None:
    args = argparse.Namespace(lr=1.0, steps=50)
    rates = [train_gpt.learning_rate(step, args) for step in range(50)]
    assert max(rates) == rates[5] == 1.0
    assert rates[:5] == sorted(rates[:5])
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[-1] == pytest.approx(0.1, abs=0.01)


def test_what_was_measured_is_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(text, "load", lambda _: TOKENS)
    out = tmp_path / "out.json"
    options = f"--model tiny --vocab {VOCAB} --batch 2 --length 16 --steps 3 --device cpu --backend eager"
    train_gpt.main([*options.split(), "--json", str(out)])
    written = json.loads(out.read_text())
    assert len(written["losses"]) == len(written["seconds"]) == 3
    assert written["peak_bytes"] > 2**20
    assert written["settings"]["backend"] == "eager"


def test_looking_for_the_largest_batch_on_a_cpu_is_refused() -> None:
    with pytest.raises(SystemExit, match="needs a CUDA device"):
        train_gpt.main(["--find-largest-batch", "--device", "cpu"])


@pytest.mark.parametrize("limit", [1, 3, 8, 9, 47, 48, 1000])
def test_the_largest_batch_is_found_in_few_trials(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    fixed, each = 10_000, 100

    def peak(args: argparse.Namespace, tokens: torch.Tensor, batch: int) -> int | None:
        return fixed + each * batch if batch <= limit else None

    monkeypatch.setattr(train_gpt, "peak_of_a_few_steps", peak)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (0, fixed + each * limit + each // 2))
    result, tried = train_gpt.largest_batch(argparse.Namespace(batch=8, device="cuda"), TOKENS)
    assert result <= limit
    assert result >= limit - max(1, limit // 32)
    assert len(tried) <= 18


def test_the_fused_head_gives_the_curve_of_eager() -> None:
    eager, fused = run("").losses, run("--backend fusedhead").losses
    torch.testing.assert_close(fused, eager, rtol=16 * torch.finfo(torch.float32).eps, atol=0)


def test_the_models_one_head_is_fused() -> None:
    model = gpt.GPT(gpt.SIZES["tiny"])
    x = torch.randint(model.config.vocab, (2, 8))
    (head,) = fusedhead.explain(model)(x, x).heads
    assert head.fused, head.reason
    assert head.where.startswith("gpt.py:")
    assert head.computes == "cross_entropy(mean, ignore_index=-1)"
    assert (head.tokens, head.hidden_size, head.vocab_size) == (16, 32, 50304)
