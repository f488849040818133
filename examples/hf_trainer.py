"""Hugging Face's Trainer with fused heads, two lines more than without: `python examples/hf_trainer.py`.

`fusedhead.enable()` and `torch_compile=True` are all there is to it. What one sees is the Trainer's own log, the loss
falling, and below it what was fused: the loss of the model, once for training and once for evaluation. The model is
a small Llama of a configuration and the text is Python's standard library, cut into bytes: nothing is downloaded.

Needs transformers and accelerate. The same without the two lines: `fusedhead run --compile-eager` on your own program.
"""

from __future__ import annotations

import argparse
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import fusedhead


class Text(torch.utils.data.Dataset):
    """Windows of a file's bytes, as a causal language model takes them."""

    def __init__(self, name: str, length: int) -> None:
        text = (Path(sysconfig.get_path("stdlib")) / name).read_bytes()
        self.windows = torch.tensor(list(text[: len(text) // length * length])).view(-1, length)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": self.windows[i], "labels": self.windows[i]}


def model(vocab: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab, **sizes))


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocab", type=int, default=32_000, help="of which the bytes are the first 256")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=6)
    args = parser.parse_args(argv)

    fusedhead.enable()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model(args.vocab),
            TrainingArguments(
                folder,
                torch_compile=True,
                max_steps=args.steps,
                per_device_train_batch_size=4,
                per_device_eval_batch_size=4,
                learning_rate=3e-3,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                use_cpu=not torch.cuda.is_available(),
            ),
            train_dataset=Text("argparse.py", args.length),
            eval_dataset=torch.utils.data.Subset(Text("heapq.py", args.length), range(8)),
        )
        trainer.train()
        trainer.evaluate()
    fusedhead.disable()
    text = Text("argparse.py", args.length)
    batch = torch.utils.data.default_collate([text[i] for i in range(4)])
    device = trainer.args.device
    print(fusedhead.explain(model(args.vocab).to(device))(**{name: x.to(device) for name, x in batch.items()}))
    return trainer.state.log_history


if __name__ == "__main__":
    main()
