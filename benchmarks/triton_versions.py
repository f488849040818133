"""Heads under two versions of Triton in turn, on one GPU: what does another release cost?

    python -m benchmarks.triton_versions --other SITE_PACKAGES [--turns 2] [--shapes ...] [--limit 300] [--out DIR]

`SITE_PACKAGES` is a folder with another Triton in it. Every turn runs ``benchmarks.head`` once under each version, the
second turn in reverse, so that a GPU that gets hotter favours neither. Caches are kept apart, and filled before the
first turn. The paired sweeps are checked first (`self_check`), as in a program that waits for them. Writes
versions.json (every turn's rows) and versions.md (their means side by side).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

SHAPES = "8192x4096x128256,16384x768x50304,8192x1024x151936,8192x2304x256000"
MEASURED = ["--data", "trained", "--tasks", "forward,train", "--contenders", "inductor,fusedhead", "--no-errors"]
CHECK = (
    "import torch; from fusedhead.kernels import self_check; self_check.PATIENCE['pairs'] = self_check.LIMIT;"
    "print('pairs serve:', torch.cuda.is_available() and self_check.serves('pairs', torch.device('cuda')))"
)
ASKED = "import triton; print(triton.__version__)"
Environment = dict[str, str]


def environments(other: Path, caches: Path) -> dict[str, Environment]:
    """The installed Triton's and the other's environment, by version."""
    found: dict[str, Environment] = {}
    for folder in ("", str(other)):
        path = os.pathsep.join(filter(None, (folder, os.environ.get("PYTHONPATH", ""))))
        environment = {**os.environ, "PYTHONPATH": path}
        command = [sys.executable, "-c", ASKED]
        version = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.strip()
        for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
            environment[name] = str(caches / version / name)
        found[version] = environment
    if len(found) < 2:
        raise SystemExit(f"both versions of Triton are {next(iter(found))}: --other has to name another one's folder")
    return found


def head(environment: Environment, *words: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "benchmarks.head", *words]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def fill_caches(versions: dict[str, Environment], shapes: str, out: Path, seconds: float) -> None:
    """Check the paired sweeps and compile every case, all side by side; what takes longer than ``seconds`` is left."""
    checks = [subprocess.Popen([sys.executable, "-c", CHECK], env=environment) for environment in versions.values()]
    deadline = time.monotonic() + seconds
    wait(checks, deadline)
    once = ["--once", *MEASURED, "--shapes"]
    cases = [(version, shape) for version in versions for shape in shapes.split(",")]
    threads = {
        "TORCHINDUCTOR_COMPILE_THREADS": str(max(1, (os.cpu_count() or 1) // len(cases))),
        "OMP_NUM_THREADS": "1",
    }
    wait(
        [head(versions[v] | threads, *once, shape, "--out", str(out / "once" / shape)) for v, shape in cases], deadline
    )


def wait(processes: list[subprocess.Popen[bytes]], deadline: float) -> None:
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def measure(versions: dict[str, Environment], given: argparse.Namespace, deadline: float) -> list[dict[str, Any]]:
    """Every turn's results: {"triton": version, "turn": number, "runs": [...], "rows": [...]}."""
    found, longest = [], 0.0
    for turn in range(given.turns):
        names = list(versions)
        for name in reversed(names) if turn % 2 else names:
            left = deadline - time.monotonic()
            if left < longest:  # a turn that would be cut short compares nothing
                return found
            began, folder = time.monotonic(), given.out / f"turn_{turn}_{name}"
            words = [*MEASURED, "--shapes", given.shapes, "--rounds", str(given.rounds), "--seconds", "0.4"]
            process = head(versions[name], *words, "--limit", f"{left:.0f}", "--out", str(folder))
            wait([process], deadline + 20)
            if (folder / "head.json").exists():
                found.append({"triton": name, "turn": turn} | json.loads((folder / "head.json").read_text()))
            longest = max(longest, time.monotonic() - began)
            print(f"turn {turn}, Triton {name}: {time.monotonic() - began:.0f} s", flush=True)
    return found


def times(found: list[dict[str, Any]]) -> dict[tuple[str, str, str, str], list[float]]:
    """Milliseconds of each turn by case, task, contender and version."""
    result: dict[tuple[str, str, str, str], list[float]] = {}
    for turn in found:
        for row in turn["rows"]:
            if row["ms"]:
                key = row["case"], row["task"], row["contender"], turn["triton"]
                result.setdefault(key, []).append(row["ms"])
    return result


def table(found: list[dict[str, Any]]) -> Iterator[str]:
    """Markdown: a row a case and task; the mean over the turns, and the greatest difference between two of them."""
    names = list(dict.fromkeys(turn["triton"] for turn in found))
    ms = times(found)
    contenders = ("fusedhead", "inductor", "bare GEMMs")
    columns = [f"{contender} {name}" for contender in contenders for name in names]
    yield "| N, D, V | task | " + " | ".join([*columns, "between turns"]) + " |"
    yield "|---" * (len(columns) + 3) + "|"
    for case, task in dict.fromkeys(key[:2] for key in ms):
        turns = [ms.get((case, task, contender, name), []) for contender in contenders for name in names]
        spread = max((max(x) / min(x) - 1 for x in turns if len(x) > 1), default=None)
        cells = [f"{mean(x):.2f}" if x else "" for x in turns]
        cells.append("" if spread is None else f"{spread:.1%}")
        yield f"| {case.split(':')[0].replace('x', ', ')} | {task} | " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--other", type=Path, required=True, help="a folder that holds another Triton")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5, help="of benchmarks.head, in each turn")
    parser.add_argument("--shapes", default=SHAPES, help="NxDxV, comma-separated")
    parser.add_argument("--limit", type=float, default=300, help="seconds for everything")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/latest"))
    given = parser.parse_args()
    deadline = time.monotonic() + given.limit
    given.out.mkdir(parents=True, exist_ok=True)
    versions = environments(given.other, given.out / "caches")
    fill_caches(versions, given.shapes, given.out, given.limit / 2)
    found = measure(versions, given, deadline)
    (given.out / "versions.json").write_text(json.dumps(found, indent=1) + "\n")
    text = "\n".join(table(found)) + "\n"
    (given.out / "versions.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
