"""Preference training with TRL on fused heads: `python examples/trl_orpo.py`.

ORPO asks a policy's logits for three things: the log-probabilities of chosen and rejected answers, a cross-entropy,
and means for its log. All are answered without building the logits; what one sees is TRL's own log (loss, rewards, log
odds) and, at the end, the head and how often it was answered. TRL's DPO and GRPO trainers multiply by the head
themselves, in chunks: nothing is left to fuse in them, and `fusedhead.enable()` leaves them as they are.

Model and tokenizer are made here, the preferences are short answers over long ones. Needs trl and datasets.
"""

from __future__ import annotations

import argparse
import os
import re
import tempfile
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
from datasets import Dataset
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

import fusedhead
from fusedhead.report import observers
from fusedhead.report.summary import Summary

QUESTIONS = [f"What is {a} plus {b}?" for a in range(1, 9) for b in range(1, 9)]


def preferences() -> Dataset:
    """Prompts with a short answer and with a long one."""
    sums = [sum(int(number) for number in re.findall(r"\d+", question)) for question in QUESTIONS]
    return Dataset.from_dict(
        {
            "prompt": QUESTIONS,
            "chosen": [f" {total}." for total in sums],
            "rejected": [f" Well, that is an interesting question, it may be {total}." for total in sums],
        }
    )


def tokenizer() -> PreTrainedTokenizerFast:
    bpe = ByteLevelBPETokenizer()
    special = ["<pad>", "<s>", "</s>"]
    bpe.train_from_iterator(QUESTIONS, vocab_size=400, special_tokens=special, show_progress=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=512
    )


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocab", type=int, default=32_000)
    parser.add_argument("--steps", type=int, default=6)
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=args.vocab, pad_token_id=0, **sizes))

    summary = Summary()
    observers.add(summary.add)
    fusedhead.enable(min_logits=0)  # the examples are short: on real ones the default decides
    with tempfile.TemporaryDirectory() as folder:
        trainer = ORPOTrainer(
            model,
            ORPOConfig(
                output_dir=folder,
                torch_compile=True,
                max_steps=args.steps,
                per_device_train_batch_size=8,
                learning_rate=1e-3,
                max_length=64,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                bf16=False,
                gradient_checkpointing=False,
                use_cpu=not torch.cuda.is_available(),
            ),
            train_dataset=preferences(),
            processing_class=tokenizer(),
        )
        trainer.train()
    fusedhead.disable()
    print(summary)
    return trainer.state.log_history


if __name__ == "__main__":
    main()
