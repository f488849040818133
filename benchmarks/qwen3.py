"""Train a Hugging Face Qwen3 of 0.6 B parameters for a few steps: ``python -m benchmarks.qwen3 --contender
NAME``.

Random weights from the published sizes, real text, everything in bfloat16, the model's own loss (logits
shifted inside, returned next to the loss, as every Hugging Face model does). One contender a process,
because Liger patches the library. `--capacity` looks for the largest batch that fits instead of timing
steps; one compilation with a dynamic batch serves all its trials.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import release, wait

SIZES = {
    "0.6B": {
        "hidden_size": 1024,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 3072,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "intermediate_size": 64,
        "vocab_size": 2048,
        "tie_word_embeddings": True,
    },
}
WARM_UP = 3  # steps until everything is compiled and the optimizer's state exists
Loss = Callable[[Tensor], Tensor]  # token ids [batch, length] -> mean loss []


def compiled(backend: str) -> Callable[[nn.Module], Any]:
    return lambda model: torch.compile(model, backend=backend)


def liger(**patches: bool) -> None:
    from liger_kernel.transformers import apply_liger_kernel_to_qwen3

    apply_liger_kernel_to_qwen3(**patches)


# What is done before the model is built, and to the model.
CONTENDERS: dict[str, tuple[Callable[[], None], Callable[[nn.Module], Any]]] = {
    "eager": (lambda: None, lambda model: model),
    "inductor": (lambda: None, compiled("inductor")),
    "liger": (liger, lambda model: model),
    "liger head + inductor": (lambda: liger(rope=False, rms_norm=False, swiglu=False), compiled("inductor")),
    "fusedhead": (lambda: None, compiled("fusedhead")),
}


def model_of(size: str, device: torch.device) -> nn.Module:
    """A Qwen3 for causal language modelling with random bfloat16 weights."""
    from transformers import AutoModelForCausalLM, Qwen3Config

    torch.manual_seed(0)
    config = Qwen3Config(**SIZES[size], use_cache=False, attn_implementation="sdpa")
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).train()


class Trainer:
    """The model, its optimizer and the text; `step` trains on one batch."""

    def __init__(self, options: argparse.Namespace) -> None:
        before, around = CONTENDERS[options.contender]
        before()
        self.options, self.device = options, torch.device(options.device)
        self.model = model_of(options.size, self.device)
        self.program = around(self.model)
        fused = self.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=fused)
        self.tokens = text_tokens(min(50304, SIZES[options.size]["vocab_size"]))

    def ids(self, batch: int, seed: int) -> Tensor:
        """Windows of the text [batch, length] int64, the same ones for every contender."""
        length = self.options.length
        draw = torch.Generator().manual_seed(seed)
        starts = torch.randint(len(self.tokens) - length, (batch,), generator=draw).tolist()
        return torch.stack([self.tokens[s : s + length] for s in starts]).long().to(self.device)

    def step(self, ids: Tensor) -> Tensor:
        loss = self.program(input_ids=ids, labels=ids).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def text_tokens(vocab: int) -> Tensor:
    """Tokens [T] int32 of Python's standard library, by the examples' tokenizer of ``vocab`` entries."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    import text

    return text.load(vocab)


def speed(trainer: Trainer) -> dict[str, Any]:
    """Median step, tokens/s, peak memory after the warm-up, first and last loss."""
    options, device = trainer.options, trainer.device
    seconds, losses = [], []
    for number in range(options.steps + WARM_UP):
        ids = trainer.ids(options.batch, number)
        if number == WARM_UP and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        wait(device)
        began = time.perf_counter()
        loss = trainer.step(ids)
        wait(device)
        seconds.append(time.perf_counter() - began)
        losses.append(loss.item())
    typical = statistics.median(seconds[WARM_UP:])
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return {
        "step_ms": typical * 1e3,
        "tokens_per_second": options.batch * options.length / typical,
        "peak_bytes": peak,
        "first_step_seconds": seconds[0],
        "losses": losses,
    }


def capacity(trainer: Trainer) -> dict[str, Any]:
    """The largest batch of which a step fits, to one part in 32, and the peak bytes of each batch tried.

    The code is compiled at ``--batch``: nearer to the largest, fewer sizes change what the compiler assumes of it.
    """
    device = trainer.device
    if device.type != "cuda":
        raise SystemExit("--capacity needs a CUDA device: a CPU swaps before it runs out of memory")
    peaks: dict[int, int | None] = {}

    def step(batch: int) -> None:
        ids = trainer.ids(batch, 0)
        torch._dynamo.maybe_mark_dynamic(ids, 0)
        trainer.step(ids)

    def peak(batch: int) -> int | None:
        if batch not in peaks:
            release(device)
            torch.cuda.reset_peak_memory_stats(device)
            peaks[batch] = None
            try:
                step(batch)
                peaks[batch] = torch.cuda.max_memory_allocated(device)
            except torch.OutOfMemoryError:
                pass
            trainer.optimizer.zero_grad(set_to_none=True)
            print(f"batch {batch}: {peaks[batch] or 'does not fit'}", file=sys.stderr)
        return peaks[batch]

    small = trainer.options.batch
    large = small + max(1, small // 4)
    step(small)  # everything is compiled and the optimizer's state exists from here on
    one, two = peak(small), peak(large)
    if one is None or two is None:
        raise SystemExit(f"--batch {small} is too large to start from: {large} sequences do not fit")
    room = torch.cuda.mem_get_info(device)[1] - two
    batch = large + int(0.97 * room * (large - small) / (two - one))
    stride = max(1, batch // 32)
    while peak(batch) is None:
        batch -= stride
    while peak(batch + stride) is not None:
        batch += stride
    return {"largest_batch": batch, "largest_tokens": batch * trainer.options.length, "peaks": peaks}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.qwen3", description=__doc__)
    parser.add_argument("--contender", choices=tuple(CONTENDERS), default="fusedhead")
    parser.add_argument("--size", choices=tuple(SIZES), default="0.6B")
    parser.add_argument("--batch", type=int, default=8, help="sequences")
    parser.add_argument("--length", type=int, default=1024, help="tokens in a sequence")
    parser.add_argument("--steps", type=int, default=10, help="timed steps")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--capacity", action="store_true", help="look for the largest batch instead")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    options = parser.parse_args(argv)
    trainer = Trainer(options)
    numbers = capacity(trainer) if options.capacity else speed(trainer)
    if options.json:
        options.json.write_text(json.dumps(numbers, indent=1))
    print(json.dumps(numbers))


if __name__ == "__main__":
    main()
