"""transformers' Trainer under FSDP2, as an accelerate configuration file asks for it."""

from __future__ import annotations

import sys

import torch
from transformers import Trainer, TrainingArguments, set_seed

from tests.e2e.models import llama
from tests.e2e.on_ranks import fsdp2_on_cpu
from tests.e2e.on_ranks.arguments import STEPS, finish, start
from tests.e2e.text import examples


def main() -> None:
    start()
    fsdp2_on_cpu.allow()
    arguments = TrainingArguments(
        output_dir=sys.argv[1] + ".out", max_steps=STEPS, per_device_train_batch_size=2, logging_steps=1,
        save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True, max_grad_norm=0.0,
    )  # fmt: skip
    set_seed(0)
    trainer = Trainer(llama(), arguments, train_dataset=examples(12))
    trainer.train()
    finish([torch.tensor(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry])


if __name__ == "__main__":
    main()
