"""One unmodified Trainer program, three ways: ``python -m benchmarks.trainer`` compares tokens/s, memory and losses.

The program (`benchmarks/trainer_program.py`) is run with ``torch_compile=True``, with ``use_liger_kernel=True``, and,
once more with ``torch_compile=True``, by ``fusedhead run``. Each run is a process; nothing is measured in this one. A
run that fails or takes too long is a line that says so.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import machine
from benchmarks.end_to_end import ROOT, run

PROGRAM = str(ROOT / "benchmarks" / "trainer_program.py")
CONTENDERS = {
    "inductor": [PROGRAM, "--compile"],
    "liger": [PROGRAM, "--liger"],
    "fusedhead": ["-m", "fusedhead", "run", PROGRAM, "--compile"],
    "liger + inductor": [PROGRAM, "--liger", "--compile"],
    "eager": [PROGRAM],
}
DEFAULT = ("inductor", "liger", "fusedhead")
HEADINGS = ("Trainer with", "step ms", "tokens/s", "peak GiB", "until warm, s", "last loss", "note")


def line(contender: str, numbers: dict[str, Any]) -> tuple[str, ...]:
    peak, losses = numbers.get("peak_bytes"), numbers.get("losses")
    return (
        contender,
        f"{numbers['step_ms']:.1f}" if "step_ms" in numbers else "",
        f"{numbers['tokens_per_second']:,.0f}" if "tokens_per_second" in numbers else "",
        f"{peak / 2**30:.2f}" if peak else "",
        f"{numbers['warm_up_seconds']:.0f}" if "warm_up_seconds" in numbers else "",
        f"{losses[-1]:.4f}" if losses else "",
        numbers.get("note", ""),
    )


def summary(log: list[str]) -> list[str]:
    """What ``fusedhead run`` printed at the end."""
    first = next((i for i, text in enumerate(log) if text.startswith("fusedhead:")), len(log))
    return log[first:]


def table(lines: list[tuple[str, ...]]) -> str:
    rows = [HEADINGS, ("---",) * len(HEADINGS), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trainer", description=__doc__)
    parser.add_argument("--contenders", type=lambda text: text.split(","), default=list(DEFAULT),
                        help=f"of {', '.join(CONTENDERS)}")  # fmt: skip
    parser.add_argument("--size", default="0.6B")
    parser.add_argument("--batch", type=int, default=8, help="sequences")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--limit", type=float, default=240, help="seconds for one run")
    parser.add_argument("--total", type=float, default=float("inf"), help="seconds for all of them")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "latest")
    words = sys.argv[1:] if argv is None else argv
    arguments = parser.parse_args(words)
    arguments.out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    origin, began = machine.origin(device, "benchmarks.trainer", words), time.monotonic()
    sizes = ["--size", arguments.size, "--batch", str(arguments.batch), "--length", str(arguments.length)]
    sizes += ["--steps", str(arguments.steps), "--warm-up", str(max(2, arguments.steps // 3))]
    rows, lines = [], []
    for contender in tqdm(arguments.contenders, unit="run"):
        left = arguments.total - (time.monotonic() - began)
        late = {"note": "not run: no time left"}
        command, limit = [*CONTENDERS[contender], *sizes], min(arguments.limit, left)
        numbers = run(command, limit, keep_log=contender == "fusedhead") if left > 30 else late
        if "step_ms" in numbers and "log" in numbers:
            numbers["fused"] = summary(numbers.pop("log"))
        rows.append({"contender": contender, **numbers})
        lines.append(line(contender, numbers))
        (arguments.out / "trainer.json").write_text(json.dumps({"run": origin, "rows": rows}, indent=1) + "\n")
        (arguments.out / "trainer.md").write_text(table(lines) + "\n")
    print(table(lines))


if __name__ == "__main__":
    main()
