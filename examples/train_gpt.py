"""Train a GPT on real text with the compiler you name: `python examples/train_gpt.py --backend fusedhead`.

The same seed gives the same initial weights and the same batches on every backend, so that the losses can be
compared step by step. `--json` writes what was measured:

    losses [steps]              the loss of each optimizer step, mean over its micro-batches
    seconds [steps]             wall time of each step, the first ones with compilation in them
    step_seconds                median of `seconds` without the first WARM_UP steps
    peak_bytes, peak_of         the memory's high-water mark, and of what it is: see `peak_memory`

On CUDA `--find-largest-batch` trains nothing; it looks for the largest --batch of which a few steps fit.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import gpt
import text
import torch
from torch import Tensor, nn
from tqdm import tqdm

WARM_UP = 3  # steps until everything is compiled and the optimizer's state exists
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--backend", choices=("eager", "inductor", "fusedhead"), default="fusedhead")
    add("--mode", choices=("default", "reduce-overhead", "max-autotune"), default="default")
    add("--model", choices=tuple(gpt.SIZES), default="demo")
    add("--vocab", type=int, default=50304, help="entries of the tokenizer, and so columns of the logits")
    add("--batch", type=int, default=8, help="sequences in a micro-batch")
    add("--length", type=int, default=512, help="tokens in a sequence")
    add("--grad-accum", type=int, default=1, help="micro-batches in a step")
    add("--steps", type=int, default=100, help="optimizer steps")
    add("--lr", type=float, default=6e-4, help="highest: after a linear warm-up, before a cosine")
    add("--dtype", choices=tuple(DTYPES), default="fp32", help="of autocast; weights stay float32")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--seed", type=int, default=1337)
    add("--json", type=Path, metavar="OUT", help="write the measurements to this file")
    add("--find-largest-batch", action="store_true", help="only look for the largest batch that fits (CUDA)")
    return parser.parse_args(argv)


def build(args: argparse.Namespace) -> nn.Module:
    """The model with its initial weights, drawn on the CPU so that every device starts from the same ones."""
    torch.manual_seed(args.seed)
    model = gpt.GPT(replace(gpt.SIZES[args.model], vocab=args.vocab, length=args.length))
    return model.to(args.device)


def compiled(model: nn.Module, args: argparse.Namespace) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    if args.backend == "eager":
        return model
    return torch.compile(model, backend=args.backend, mode=None if args.mode == "default" else args.mode)


def optimizer_of(model: nn.Module, args: argparse.Namespace) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)


def learning_rate(step: int, args: argparse.Namespace) -> float:
    warm_up = max(1, min(100, args.steps // 10))
    if step < warm_up:
        return args.lr * (step + 1) / warm_up
    done = (step - warm_up) / max(1, args.steps - warm_up)
    return args.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


def peak_memory(device: torch.device) -> tuple[int, str]:
    """High-water mark in bytes, and of what.

    On CUDA: of the allocator, since the warm-up ended. On the CPU: of the whole process's resident memory
    since it began, Python, torch and compilation included; compare runs that have a process of their own.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), "torch.cuda.max_memory_allocated after the warm-up"
    with contextlib.suppress(OSError):
        # Not getrusage first: on Linux a child's ru_maxrss starts at its parent's size.
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024, "peak resident memory of the process"
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "peak resident memory of the process"


@dataclass
class Measurements:
    """Of one run; the fields are described at the top of this file."""

    parameters: int
    losses: list[float]
    seconds: list[float]
    step_seconds: float
    peak_bytes: int
    peak_of: str


def train(args: argparse.Namespace, tokens: Tensor) -> Measurements:
    """Run `args.steps` optimizer steps and say what they cost."""
    device = torch.device(args.device)
    model = build(args)
    step_model = compiled(model, args)
    optimizer = optimizer_of(model, args)
    scaler = torch.amp.GradScaler(device.type, enabled=args.dtype == "fp16")
    batches = text.Batches(tokens, args.batch, args.length, args.seed, device)
    losses: list[float] = []
    seconds: list[float] = []
    with tqdm(total=args.steps, desc=f"{args.backend}, compiling", unit="step") as bar:
        for step in range(args.steps):
            if device.type == "cuda" and step == WARM_UP:
                torch.cuda.reset_peak_memory_stats(device)
            began = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, args)
            total = torch.zeros((), device=device)
            for _ in range(args.grad_accum):
                x, y = batches.draw()
                with torch.autocast(device.type, DTYPES[args.dtype], enabled=args.dtype != "fp32"):
                    _, loss = step_model(x, y)
                scaler.scale(loss / args.grad_accum).backward()
                total += loss.detach() / args.grad_accum
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            losses.append(total.item())  # waits for the device: the time below is the whole step's
            seconds.append(time.perf_counter() - began)
            bar.set_description(args.backend)
            bar.set_postfix(loss=f"{losses[-1]:.4f}", ms=f"{seconds[-1] * 1e3:.0f}")
            bar.update()
    peak, peak_of = peak_memory(device)
    parameters = sum(p.numel() for p in model.parameters())
    typical = statistics.median(seconds[WARM_UP:] or seconds)
    return Measurements(parameters, losses, seconds, typical, peak, peak_of)


def peak_of_a_few_steps(args: argparse.Namespace, tokens: Tensor, batch: int) -> int | None:
    """Bytes that training with `batch` sequences needs, None where the device does not have them."""
    torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()
    trial = argparse.Namespace(**{**vars(args), "batch": batch, "steps": WARM_UP + 2})
    try:
        return train(trial, tokens).peak_bytes
    except torch.OutOfMemoryError:
        return None


def largest_batch(args: argparse.Namespace, tokens: Tensor) -> tuple[int, dict[int, int | None]]:
    """The largest batch that fits, to one part in 32, and the peak bytes of every batch tried.

    Memory is close to a + b·batch, so two small trials predict the limit; from there it is walked to.
    """
    peaks: dict[int, int | None] = {}

    def peak(batch: int) -> int | None:
        if batch not in peaks:
            peaks[batch] = peak_memory = peak_of_a_few_steps(args, tokens, batch)
            tqdm.write(f"batch {batch}: {'does not fit' if peak_memory is None else f'{peak_memory / 2**30:.2f} GiB'}")
        return peaks[batch]

    batch = 2 * args.batch
    one, two = peak(args.batch), peak(batch)
    if one is not None and two is not None:
        memory = torch.cuda.mem_get_info(torch.device(args.device))[1]
        batch += (memory - two) * args.batch // (two - one)
    step = max(1, batch // 32)
    while peak(batch) is not None:
        batch += step
    while peak(batch) is None:
        batch -= step
        if batch < 1:
            raise SystemExit("not even one sequence fits")
    return batch, peaks


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    device = torch.device(args.device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    elif args.find_largest_batch:
        raise SystemExit("--find-largest-batch needs a CUDA device: a CPU swaps before it runs out of memory")
    tokens = text.load(args.vocab)
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
    result: dict[str, object] = {
        "settings": {**vars(args), "json": str(args.json)},
        "torch": torch.__version__,
        "hardware": hardware,
        "threads": torch.get_num_threads(),
    }
    if args.find_largest_batch:
        batch, peaks = largest_batch(args, tokens)
        result |= {"largest_batch": batch, "peaks": peaks}
        print(f"{args.backend}: the largest batch that fits is {batch} x {args.length} tokens")
    else:
        run = train(args, tokens)
        result |= asdict(run)
        print(
            f"{args.backend}: loss {run.losses[0]:.4f} -> {run.losses[-1]:.4f}, "
            f"{run.step_seconds * 1e3:.1f} ms a step, {run.peak_bytes / 2**20:.0f} MiB {run.peak_of}"
        )
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
