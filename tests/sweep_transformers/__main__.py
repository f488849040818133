"""``python -m tests.sweep_transformers``: every language model class of transformers, tiny, trained one step.

Compiled with fusedhead against eager code and a float64 truth (`verdict.py`). By default the rewritten graphs are
executed as they are; ``--aot`` hands them to AOTAutograd, ``--inductor`` to Inductor.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import signal
import sys
from dataclasses import asdict
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported: the processes are the parallelism
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("FUSEDHEAD_MIN_LOGITS", "0")  # tiny models are not to be left alone because they are tiny

import json

import torch
from tqdm import tqdm

from tests.sweep_transformers.pool import judged
from tests.sweep_transformers.table import markdown, merged, summary
from tests.sweep_transformers.verdict import Verdict

FAMILIES = re.compile(r"For(CausalLM|MaskedLM|ConditionalGeneration|PreTraining)$|LMHead")


def classes() -> list[str]:
    """The names of all classes of the installed transformers that the sweep is about."""
    import transformers

    return [name for name in dir(transformers) if FAMILIES.search(name) and not name.startswith("Auto")]


def sample(names: list[str], count: int) -> list[str]:
    """So many of the names, evenly spread, the same ones on every call."""
    return [names[i * len(names) // count] for i in range(min(count, len(names)))]


STACKS = {
    "eager": "executed as they are",
    "aot": "handed to AOTAutograd (aot_eager)",
    "inductor": "compiled by Inductor",
}


def origin(stacks: set[str]) -> str:
    import transformers

    versions = f"transformers {transformers.__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    ways = "; ".join(f"{stack}: rewritten graphs {how}" for stack, how in STACKS.items() if stack in stacks)
    return f"{versions}, CPU, float32. {ways}"


def read(file: Path) -> list[Verdict]:
    return [Verdict(**row) for row in json.loads(file.read_text())["rows"]]


def write(folder: Path, verdicts: list[Verdict], run: str) -> None:
    """The results as JSON, and as a table for people."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"run": run, "rows": [asdict(v) for v in verdicts]}, indent=1)
    (folder / "sweep_transformers.json").write_text(text + "\n")
    page = markdown(verdicts, "Every language model class of transformers", run + ".")
    (folder / "sweep_transformers.md").write_text(page)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sweep_transformers", description=__doc__)
    parser.add_argument("--only", default="", metavar="PATTERN", help="a regular expression that class names match")
    parser.add_argument("--sample", type=int, metavar="K", help="K of the classes, evenly spread")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--limit", type=float, default=120, help="seconds for one class")
    stacks = parser.add_mutually_exclusive_group()
    stacks.add_argument("--aot", dest="stack", action="store_const", const="aot", default="eager")
    stacks.add_argument("--inductor", dest="stack", action="store_const", const="inductor")
    parser.add_argument("--merge", type=Path, nargs="+", help="run nothing: one table of these sweep_transformers.json")
    parser.add_argument("--out", type=Path, help="folder for sweep_transformers.json and sweep_transformers.md")
    arguments = parser.parse_args(argv)
    if arguments.merge:
        runs = [read(file) for file in arguments.merge]
        results = merged(runs)
        write(arguments.out or Path(), results, origin({v.stack for run in runs for v in run}))
        print("\n".join(summary(results)))
        return 0

    import torch._dynamo
    import torch._inductor.compile_fx  # noqa: F401  imported once, for all processes

    names = [name for name in classes() if re.search(arguments.only, name)]
    names = sample(names, arguments.sample) if arguments.sample else names
    results = []
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        verdicts = judged(names, arguments.stack, arguments.jobs, arguments.limit)
        for verdict, _ in tqdm(verdicts, total=len(names), unit="class"):
            results.append(verdict)
            if verdict.kind not in ("fused", "no head"):
                tqdm.write(f"{verdict.name}: {verdict.kind}. {verdict.detail}", file=sys.stderr)
    finally:  # also when it is stopped
        results.sort(key=lambda v: v.name)
        if arguments.out:
            write(arguments.out, results, origin({arguments.stack}))
    print("\n".join(summary(results)))
    return any(v.kind in ("fails", "differs") for v in results)


if __name__ == "__main__":
    sys.exit(main())
