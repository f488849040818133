"""transformers' Trainer with ``torch_compile=True``: nothing in these programs knows fusedhead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    DataCollatorForLanguageModeling,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
)

from tests.e2e.comparison import BFLOAT16, Trained, check, weights
from tests.e2e.models import IDS, SMALL, llama
from tests.e2e.text import VOCAB, examples, tokenizer


def gemma2() -> Any:
    config = Gemma2Config(**SMALL, **IDS, num_key_value_heads=1, head_dim=32, sliding_window=16)
    return Gemma2ForCausalLM(config)


def gpt2() -> Any:
    config = GPT2Config(n_embd=64, n_layer=1, n_head=2, n_positions=64, **IDS, use_cache=False)
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    return GPT2LMHeadModel(config)


def bert() -> Any:
    config = BertConfig(**SMALL, vocab_size=VOCAB, pad_token_id=0, max_position_embeddings=64)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    return BertForMaskedLM(config)


def bart() -> Any:
    config = BartConfig(
        **IDS,
        d_model=64,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        max_position_embeddings=64,
        dropout=0.0,
        decoder_start_token_id=2,
        forced_eos_token_id=None,
    )
    return BartForConditionalGeneration(config)


def arguments(folder: Path, compiled: bool, cls: type = TrainingArguments, **more: Any) -> Any:
    return cls(
        output_dir=str(folder),
        max_steps=4,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        torch_compile=compiled,
        disable_tqdm=True,
        **more,
    )


def trained(trainer: Trainer, evaluate: bool = False) -> Trained:
    """Train, and take what the trainer logged."""
    before = weights(trainer.model)
    trainer.train()
    logged = {
        f"{key} {entry['step']}": float(entry[key])
        for entry in trainer.state.log_history
        for key in ("loss", "grad_norm")
        if key in entry
    }
    if evaluate:
        result = trainer.evaluate()
        logged |= {key: result[key] for key in result if "loss" in key or "accuracy" in key}
    return Trained(logged, before, weights(trainer.model))


@pytest.mark.parametrize("model", [llama, gpt2, gemma2])
def test_a_causal_lm_is_fine_tuned(model: Any, tmp_path: Path) -> None:
    """GPT-2 warns between its head and its loss; Gemma 2 caps its logits."""

    def program(compiled: bool) -> Trained:
        return trained(Trainer(model(), arguments(tmp_path, compiled), train_dataset=examples(24)))

    check(program, heads=1)


def test_logits_that_are_returned_may_be_computed_at_once(tmp_path: Path) -> None:
    def program(compiled: bool) -> Trained:
        return trained(Trainer(llama(), arguments(tmp_path, compiled), train_dataset=examples(24)))

    check(program, heads=1, logits="eager")


def accuracy(prediction: Any) -> dict[str, float]:
    logits, labels = prediction
    guessed, labels = np.argmax(logits[:, :-1], -1), labels[:, 1:]
    return {"accuracy": float((guessed == labels)[labels != -100].mean())}


def test_evaluation_reads_the_logits(tmp_path: Path) -> None:
    def program(compiled: bool) -> Trained:
        data = examples(24)
        settings = arguments(tmp_path, compiled, eval_strategy="steps", eval_steps=2)
        trainer = Trainer(llama(), settings, train_dataset=data, eval_dataset=data, compute_metrics=accuracy)
        return trained(trainer, evaluate=True)

    fused = check(program, heads=1)
    assert "eval_accuracy" in fused.logged


def test_accumulation_and_mixed_precision(tmp_path: Path) -> None:
    def program(compiled: bool) -> Trained:
        settings = arguments(tmp_path, compiled, bf16=True, gradient_accumulation_steps=2)
        return trained(Trainer(llama(), settings, train_dataset=examples(32)))

    check(program, heads=1, slack=BFLOAT16)


def test_the_backend_by_its_own_name(tmp_path: Path) -> None:
    """accelerate refuses names it does not know; while fusedhead is enabled it knows this one."""

    def program(compiled: bool) -> Trained:
        from fusedhead import changes

        named = {"torch_compile_backend": "fusedhead"} if changes() else {}
        return trained(Trainer(llama(), arguments(tmp_path, compiled, **named), train_dataset=examples(24)))

    check(program, heads=1)


def test_a_masked_lm(tmp_path: Path) -> None:
    def program(compiled: bool) -> Trained:
        data = examples(24, length=33)
        for row in data.rows:
            row["input_ids"] = row["input_ids"][:32]  # type: ignore[index]
            del row["labels"]
        collator = DataCollatorForLanguageModeling(tokenizer(), mlm_probability=0.3)
        settings = arguments(tmp_path, compiled, remove_unused_columns=False)
        return trained(Trainer(bert(), settings, train_dataset=data, data_collator=collator))

    check(program, heads=1)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_seq2seq(smoothing: float, tmp_path: Path) -> None:
    """With label smoothing the trainer computes the loss itself, outside of what is compiled, from the logits."""

    def program(compiled: bool) -> Trained:
        data = examples(24)
        settings = arguments(tmp_path, compiled, Seq2SeqTrainingArguments, label_smoothing_factor=smoothing)
        trainer = Seq2SeqTrainer(bart(), settings, train_dataset=data, eval_dataset=data)
        return trained(trainer, evaluate=True)

    check(program, heads=1)


def test_the_loss_of_a_model_in_bfloat16(tmp_path: Path) -> None:
    def program(compiled: bool) -> Trained:
        model = llama().to(torch.bfloat16)
        return trained(Trainer(model, arguments(tmp_path, compiled), train_dataset=examples(24)))

    check(program, heads=1, slack=BFLOAT16)
