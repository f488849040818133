"""Training steps on several GPUs: ``torchrun --nproc-per-node 2 -m benchmarks.distributed_steps``.

GPT-2 124M under DDP and FSDP2, loss inside and outside, logits returned, and with --models qwen3 Qwen3 0.6B under
FSDP2: milliseconds of a step, peak memory of the rank that has most, and losses, Inductor beside fusedhead. Writes one
JSON file.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import machine, measure, ranks
from benchmarks.distributed_models import GPT, QWEN3, Make, Sizes, tokens
from benchmarks.head import reason
from fusedhead.report import observers
from fusedhead.report.summary import Summary

WARM_UP, STEPS = 6, 20
MODELS = {"gpt": GPT, "qwen3": QWEN3}
SHAPES = {"gpt": (16, 1024, 50304), "qwen3": (4, 2048, 151936)}  # sequences of a rank, length, vocabulary


def train(make: Make, sizes: Sizes, backend: str, device: torch.device, warm_up: int, steps: int) -> dict[str, Any]:
    """Losses (the mean of the ranks'), milliseconds of the slowest rank, peak bytes, and the report's heads."""
    torch.compiler.reset()
    torch.manual_seed(0)
    began, summary = time.monotonic(), Summary()
    remove = observers.add(summary.add)
    try:
        model, step = make(sizes, backend)
        optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4)
        torch.manual_seed(1 + dist.get_rank())
        losses, seconds = [], []
        for at in range(warm_up + steps):
            x, y = tokens(sizes)
            if at == warm_up and device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            measure.wait(device)
            start = time.perf_counter()
            loss = step(x, y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach().float())
            measure.wait(device)
            seconds.append(time.perf_counter() - start)
        mean = torch.stack(losses)
        dist.all_reduce(mean)
    finally:
        remove()
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    record = {
        "losses": [round(x, 5) for x in (mean / dist.get_world_size()).tolist()],
        "ms": 1e3 * ranks.greatest(statistics.median(seconds[warm_up:]), device),
        "peak_bytes": int(ranks.greatest(float(peak), device)),
        "total_seconds": round(time.monotonic() - began, 1),
        "heads": [str(head) for head in summary.heads()],
    }
    del model, step, optimizer, loss
    gc.collect()
    measure.release(device)
    return record


def table(records: dict[str, dict[str, Any]], backends: list[str], count: int) -> str:
    """Markdown; ``count`` tokens a step of all ranks."""
    heads = ["", *(f"{name}: ms, GiB, tokens/s" for name in backends), "losses differ by"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for arrangement, arms in records.items():
        told = [arms.get(name, {"note": "not run: no time left"}) for name in backends]
        cells = [
            arm.get("note") or f"{arm['ms']:.1f}, {arm['peak_bytes'] / 2**30:.2f}, {1e3 * count / arm['ms']:,.0f}"
            for arm in told
        ]
        losses = [arm["losses"] for arm in told if "losses" in arm]
        apart = max((abs(a - b) for a, b in zip(losses[0], losses[-1])), default=0.0) if len(losses) > 1 else None
        lines.append(f"| {arrangement} | " + " | ".join(cells) + f" | {'' if apart is None else f'{apart:.1e}'} |")
    return "\n".join(lines)


def main(words: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.distributed_steps", description=__doc__.splitlines()[0])
    parser.add_argument("--models", choices=sorted(MODELS), default="gpt")
    parser.add_argument("--backends", type=lambda s: s.split(","), default=["inductor", "fusedhead"])
    parser.add_argument("--only", default="", help="arrangements whose name has this in it")
    parser.add_argument("--tiny", action="store_true", help="a size for a CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--limit", type=float, default=float("inf"), help="no arm begins after so many seconds")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/latest/distributed_steps.json"))
    words = sys.argv[1:] if words is None else words
    arguments, began = parser.parse_args(words), time.monotonic()
    device = ranks.device_of_this_rank(arguments.device)
    sizes = Sizes(arguments.device, arguments.tiny, *((2, 64, 2048) if arguments.tiny else SHAPES[arguments.models]))
    warm_up, steps = (1, 2) if arguments.tiny else (WARM_UP, STEPS)
    torch.set_float32_matmul_precision("high")
    records: dict[str, dict[str, Any]] = {}
    with ranks.process_group(device):
        first, count = dist.get_rank() == 0, dist.get_world_size()
        for name, make in MODELS[arguments.models].items():
            for backend in arguments.backends if arguments.only in name else ():
                if ranks.greatest(time.monotonic() - began, device) > arguments.limit:
                    continue
                try:
                    arm = train(make, sizes, backend, device, warm_up, steps)
                except Exception as error:  # the ranks run the same program: all of them come here
                    arm = {"note": reason(error)}
                records.setdefault(name, {})[backend] = arm
                if first:
                    print(f"{name}, {backend}: {arm.get('note') or arm['ms']}", file=sys.stderr, flush=True)
        if first:
            origin = machine.origin(device, "benchmarks.distributed_steps", words)
            sized = {**sizes._asdict(), "ranks": count}
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            arguments.json.write_text(json.dumps({"run": origin, "sizes": sized, "rows": records}, indent=1) + "\n")
            print(table(records, arguments.backends, count * sizes.batch * sizes.length), flush=True)
    return records


if __name__ == "__main__":
    main()
