"""Whole models: ``python -m benchmarks.end_to_end`` runs a GPT-2 124M and a Qwen3 0.6B under each contender.

It starts one process a run (`examples/train_gpt.py` and `benchmarks.qwen3`), collects their JSON and writes
end_to_end.json and a table. Nothing is measured in this process. A run that fails or takes longer than
--limit is a line that says so.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import torch
from tqdm import tqdm

from benchmarks import machine

ROOT = Path(__file__).parents[1]
HEADINGS = ("model", "contender", "batch x length", "step ms", "tokens/s", "peak GiB", "last loss",
            "largest batch", "largest tokens", "note")  # fmt: skip


def gpt(contender: str, options: argparse.Namespace, largest: bool) -> list[str]:
    words = [str(ROOT / "examples" / "train_gpt.py"), "--backend", contender, "--model", options.gpt]
    words += ["--batch", str(options.gpt_batch), "--length", str(options.gpt_length), "--steps", str(options.steps)]
    words += ["--dtype", "bf16", "--device", options.device]
    return words + (["--find-largest-batch"] if largest else [])


def qwen3(contender: str, options: argparse.Namespace, largest: bool) -> list[str]:
    words = ["-m", "benchmarks.qwen3", "--contender", contender, "--size", options.qwen3]
    words += [
        "--batch",
        str(options.batch),
        "--length",
        str(options.length),
        "--steps",
        str(options.steps),
        "--device",
        options.device,
    ]
    return words + (["--capacity"] if largest else [])


Command = Callable[[str, argparse.Namespace, bool], list[str]]
MODELS: dict[str, tuple[Command, tuple[str, ...]]] = {
    "gpt": (gpt, ("inductor", "fusedhead")),
    "qwen3": (qwen3, ("inductor", "liger", "liger head + inductor", "fusedhead")),
}


def run(words: list[str], limit: float, keep_log: bool = False) -> dict[str, Any]:
    """The numbers that a command writes, or why there are none (``note``); then, or on demand, its end (``log``)."""
    environment = {**os.environ, "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p)
    with tempfile.TemporaryDirectory() as folder, open(Path(folder, "log"), "w+") as log:
        file = Path(folder, "numbers.json")
        try:
            done = subprocess.run(
                [sys.executable, *words, "--json", str(file)],
                cwd=ROOT, env=environment, stdout=log, stderr=log, timeout=limit,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return {"note": f"took longer than {limit:.0f} s", "log": ending(log)}
        if done.returncode or not file.exists():
            log_end = ending(log)
            return {"note": f"exit code {done.returncode}: {log_end[-1][:160]}", "log": log_end}
        return {**json.loads(file.read_text()), **({"log": ending(log)} if keep_log else {})}


def ending(log: TextIO) -> list[str]:
    """The last lines of an output."""
    log.seek(0)
    return log.read().strip().splitlines()[-20:] or [""]


def line(model: str, contender: str, sizes: str, numbers: dict[str, Any]) -> tuple[str, ...]:
    """One line of the table, columns as HEADINGS; both workers' names for the same things are read."""
    step = numbers.get("step_ms") or 1e3 * numbers.get("step_seconds", 0)
    tokens = numbers.get("tokens_per_second")
    batch, length = map(int, sizes.split("x"))
    if step and not tokens:
        tokens = 1e3 * batch * length / step
    largest = numbers.get("largest_batch")
    losses = numbers.get("losses")
    peak = numbers.get("peak_bytes")
    return (
        model,
        contender,
        sizes,
        f"{step:.1f}" if step else "",
        f"{tokens:,.0f}" if tokens else "",
        f"{peak / 2**30:.2f}" if peak else "",
        f"{losses[-1]:.3f}" if losses else "",
        str(largest) if largest else "",
        f"{largest * length:,}" if largest else "",
        numbers.get("note", ""),
    )


def table(lines: list[tuple[str, ...]]) -> str:
    """Markdown."""
    rows = [HEADINGS, ("---",) * len(HEADINGS), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.end_to_end", description=__doc__)
    names = lambda text: text.split(",")  # noqa: E731
    parser.add_argument("--models", type=names, default=list(MODELS), help="of gpt, qwen3")
    parser.add_argument("--contenders", type=names, help="default: by model")
    parser.add_argument("--parts", type=names, default=["speed"], help="of speed, largest")
    parser.add_argument("--gpt", default="124M", help="--model of examples/train_gpt.py")
    parser.add_argument("--gpt-batch", type=int, default=16)
    parser.add_argument("--gpt-length", type=int, default=1024)
    parser.add_argument("--qwen3", default="0.6B", help="--size of benchmarks.qwen3")
    parser.add_argument("--batch", type=int, default=8, help="sequences of Qwen3")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--limit", type=float, default=240, help="seconds for one run")
    parser.add_argument("--total", type=float, default=float("inf"), help="seconds for all of them")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "latest")
    words = sys.argv[1:] if argv is None else argv
    options = parser.parse_args(words)
    options.out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    origin = machine.origin(torch.device(options.device), "benchmarks.end_to_end", words)
    plan = [
        (model, contender, part)
        for model in options.models
        for part in options.parts
        for contender in options.contenders or MODELS[model][1]
    ]
    results, lines = [], []
    for model, contender, part in tqdm(plan, unit="run"):
        command = MODELS[model][0](contender, options, part == "largest")
        left = options.total - (time.monotonic() - began)
        numbers = run(command, min(options.limit, left)) if left > 30 else {"note": "not run: no time left"}
        sizes = f"{options.gpt_batch}x{options.gpt_length}" if model == "gpt" else f"{options.batch}x{options.length}"
        results.append({"model": model, "contender": contender, "part": part, "sizes": sizes, **numbers})
        lines.append(line(model, contender, sizes, numbers))
        (options.out / "end_to_end.json").write_text(json.dumps({"run": origin, "rows": results}, indent=1))
        (options.out / "end_to_end.md").write_text(table(lines) + "\n")
    print(table(lines))


if __name__ == "__main__":
    main()
