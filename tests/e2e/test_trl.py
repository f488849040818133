"""TRL's trainers with ``torch_compile=True``: supervised, preference and reinforcement."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer
from trl.trainer.utils import entropy_from_logits, selective_log_softmax

from tests.e2e.comparison import Trained, check, weights
from tests.e2e.models import llama
from tests.e2e.text import passages, tokenizer, tokens


def arguments(cls: type, folder: Path, compiled: bool, **more: Any) -> Any:
    inputs = {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "torch_compile": compiled,
        "disable_tqdm": True,
    }
    return cls(**{**inputs, **more})


def trained(trainer: Any, keys: tuple[str, ...]) -> Trained:
    before = weights(trainer.model)
    trainer.train()
    logged = {
        f"{key} {entry['step']}": float(entry[key])
        for entry in trainer.state.log_history
        for key in keys
        if key in entry
    }
    return Trained(logged, before, weights(trainer.model))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_sft(smoothing: float, tmp_path: Path) -> None:
    """TRL fuses head and loss itself, and nothing must disturb it; with label smoothing it asks for the logits."""

    def program(compiled: bool) -> Trained:
        data = Dataset.from_dict({"text": passages(12)})
        settings = arguments(SFTConfig, tmp_path, compiled, max_length=64, label_smoothing_factor=smoothing)
        trainer = SFTTrainer(llama(), settings, train_dataset=data, processing_class=tokenizer())
        return trained(trainer, ("loss", "mean_token_accuracy", "grad_norm"))

    check(program, heads=1 if smoothing else 0)


def test_dpo(tmp_path: Path) -> None:
    """TRL's own fused head gives the log-probabilities; what is compiled around it must come out the same."""
    torch.manual_seed(0)
    llama().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")

    def program(compiled: bool) -> Trained:
        texts = passages(12, 120)
        data = Dataset.from_dict(
            {
                "prompt": [text[:40] for text in texts],
                "chosen": [text[40:100] for text in texts],
                "rejected": [text[100:] + text[60:80] for text in texts],
            }
        )
        settings = arguments(DPOConfig, tmp_path, compiled, max_length=64)
        trainer = DPOTrainer(str(tmp_path / "model"), args=settings, train_dataset=data, processing_class=tokenizer())
        return trained(trainer, ("loss", "rewards/margins", "logps/chosen", "logps/rejected"))

    check(program, heads=0)


def test_log_probabilities_and_entropy_of_a_policy() -> None:
    """What trainers of policies take from the logits of a model that is compiled without its loss."""

    def program(compiled: bool) -> Trained:
        model = llama()
        run = torch.compile(model) if compiled else model
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        before, logged = weights(model), {}
        for step, batch in enumerate(tokens(3, 4, 33)):
            logits = run(input_ids=batch).logits[:, :-1] / 0.9
            log_probs = selective_log_softmax(logits, batch[:, 1:])
            with torch.no_grad():
                logged[f"entropy {step}"] = float(entropy_from_logits(logits).mean())
            advantages = torch.linspace(-1, 1, 4)[:, None]
            loss = -(torch.exp(log_probs - log_probs.detach()) * advantages).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            logged[f"log-probability {step}"] = float(log_probs.detach().mean())
        return Trained(logged, before, weights(model))

    check(program, heads=1)


def test_grpo(tmp_path: Path) -> None:
    """As DPO, and between the steps the model that is compiled for training generates text, with a cache."""

    def program(compiled: bool) -> Trained:
        data = Dataset.from_dict({"prompt": [text[:40] for text in passages(12)]})

        def reward(completions: list[str], **_: Any) -> list[float]:
            return [float(len(set(text))) / 10 for text in completions]

        settings = arguments(GRPOConfig, tmp_path, compiled, num_generations=2, max_completion_length=8, max_steps=2)
        trainer = GRPOTrainer(llama(), reward, args=settings, train_dataset=data, processing_class=tokenizer())
        return trained(trainer, ("loss", "reward", "entropy", "grad_norm"))

    check(program, heads=0)
