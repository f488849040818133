"""An ordinary program of transformers' Trainer: fine-tunes a Qwen3 with random weights on real text, in bfloat16.

It knows nothing of fusedhead. `benchmarks.trainer` runs it as it is, and under ``fusedhead run``. Steps are timed by
a callback between their ends; the first ones, which compile, do not count.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from benchmarks.measure import wait
from benchmarks.qwen3 import SIZES, model_of, text_tokens


class Text(Dataset):  # type: ignore[type-arg]
    """Windows of ``length`` tokens; every position is a label."""

    def __init__(self, tokens: Tensor, count: int, length: int) -> None:
        self.tokens, self.length = tokens, length
        self.starts = torch.randint(len(tokens) - length, (count,), generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        start = int(self.starts[i])
        ids = self.tokens[start : start + self.length].long()
        return {"input_ids": ids, "labels": ids}


class Clock(TrainerCallback):
    """The time of every step, and the peak memory of the steps after the warm-up."""

    def __init__(self, device: torch.device, warm_up: int) -> None:
        self.device, self.warm_up = device, warm_up
        self.seconds: list[float] = []

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.last = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        wait(self.device)
        now = time.perf_counter()
        self.seconds.append(now - self.last)
        if len(self.seconds) == self.warm_up and self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self.last = time.perf_counter()

    def numbers(self, tokens: int) -> dict[str, Any]:
        typical = statistics.median(self.seconds[self.warm_up :])
        peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None
        return {
            "step_ms": typical * 1e3,
            "tokens_per_second": tokens / typical,
            "peak_bytes": peak,
            "first_step_seconds": self.seconds[0],
            "warm_up_seconds": sum(self.seconds[: self.warm_up]),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=tuple(SIZES), default="0.6B")
    parser.add_argument("--batch", type=int, default=8, help="sequences")
    parser.add_argument("--length", type=int, default=1024, help="tokens in a sequence")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--warm-up", type=int, default=8, help="steps that do not count")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--liger", action="store_true")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    args = parser.parse_args()

    set_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = model_of(args.size, device)
    data = Text(text_tokens(min(50304, SIZES[args.size]["vocab_size"])), args.batch * args.steps, args.length)
    clock = Clock(device, args.warm_up)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=args.steps,
            per_device_train_batch_size=args.batch,
            learning_rate=1e-4,
            bf16=True,
            torch_compile=args.compile,
            use_liger_kernel=args.liger,
            optim="adamw_torch_fused" if device.type == "cuda" else "adamw_torch",
            logging_steps=5,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=device.type == "cpu",
        )
        trainer = Trainer(model, arguments, train_dataset=data, callbacks=[clock])
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    numbers = {**clock.numbers(args.batch * args.length), "losses": [float(loss) for loss in losses]}
    if args.json:
        args.json.write_text(json.dumps(numbers, indent=1))
    print(json.dumps(numbers))


if __name__ == "__main__":
    main()
