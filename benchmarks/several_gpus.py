"""Everything that needs several GPUs, in ten minutes: ``python -m benchmarks.several_gpus [--out DIR] [--parts a,b]``.

| part     | what it runs                                                                                            |
|----------|---------------------------------------------------------------------------------------------------------|
| matrix   | tests.parallel.device: every arrangement under NCCL in bfloat16 and float32 against one process           |
| killed   | benchmarks.killed_rank: a rank dies in a step                                                           |
| heads    | benchmarks.parallel: as many shards as GPUs, against one GPU's head and Inductor under loss_parallel()  |
| gpt      | benchmarks.distributed_steps: GPT-2 124M under DDP and FSDP2                                            |
| alone    | benchmarks.parallel on one GPU a shape: 1, 2, 4, 8 shards without a wire                                |
| qwen3    | benchmarks.distributed_steps: Qwen3 0.6B under FSDP2                                                    |

Each command has a limit of its own, so that one that hangs takes no other with it: it and all of its processes are
ended. What nobody times runs side by side. Logs and JSON lie in --out; short tables are printed last. Nothing is
measured in this process. NVLink multicast is left off (NCCL_NVLS_ENABLE=0) where the environment says nothing of it.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from benchmarks import killed_rank

ROOT = Path(__file__).parents[1]
SHAPES = ("8192x8192x128256", "16384x4096x256000")
# in the environment of a command's processes: torchrun starts ranks in sessions of their own
MARK = "FUSEDHEAD_BENCHMARK_PART"
LEAST = 20  # seconds left, below which a part is not begun
TAIL = 16  # lines of a log that are shown


class Command(NamedTuple):
    name: str
    words: list[str]
    limit: float  # seconds
    visible: str | None = None  # CUDA_VISIBLE_DEVICES


def torchrun(arguments: argparse.Namespace, port: int, *words: str) -> list[str]:
    where = ["--nproc-per-node", str(arguments.ranks), "--master-addr", "127.0.0.1", "--master-port", str(port)]
    return ["-m", "torch.distributed.run", *where, *words]


def commands(arguments: argparse.Namespace) -> dict[str, list[list[Command]]]:
    """By part: the groups of commands that run one after the other, each group side by side."""
    out, port = str(arguments.out), 20000 + os.getpid() % 10000
    heads, alone = [], []
    for at, shape in enumerate(arguments.shapes):
        words = ["-m", "benchmarks.parallel", "--shapes", shape]
        folder = f"{out}/heads_{at}"
        run = torchrun(arguments, port + at, *words, "--rounds", "7", "--limit", "95", "--out", folder)
        heads.append([Command(f"heads_{at}", run, 110)])
        run = [*words, "--rounds", "9", "--limit", "55", "--out", f"{out}/alone_{at}"]
        alone.append(Command(f"alone_{at}", run, 65, str(at % arguments.ranks)))
    steps = ["-m", "benchmarks.distributed_steps"]
    matrix = torchrun(arguments, port + 8, "-m", "tests.parallel.device", "--out", out)
    gpt = torchrun(arguments, port + 9, *steps, "--limit", "120", "--json", f"{out}/gpt.json")
    qwen3 = torchrun(arguments, port + 10, *steps, "--models", "qwen3", "--limit", "60", "--json", f"{out}/qwen3.json")
    start, ended = 65, killed_rank.TIMEOUT + killed_rank.ROOM  # seconds to the death of a rank, and from then on
    killed = ["-m", "benchmarks.killed_rank", "--start", str(start), "--json", f"{out}/killed_rank.json"]
    return {
        "matrix": [[Command("matrix", matrix, 125)]],
        "killed": [[Command("killed", killed, start + ended + 10)]],
        "heads": heads,
        "gpt": [[Command("gpt", gpt, 160)]],
        "alone": [alone],
        "qwen3": [[Command("qwen3", qwen3, 80)]],
    }


def groups(arguments: argparse.Namespace) -> list[list[Command]]:
    """The commands of the parts that are asked for; matrix and killed, which nobody times, are one group."""
    of = commands(arguments)
    untimed = [command for part in ("matrix", "killed") if part in arguments.parts for (command,) in of[part]]
    timed = [group for part in of if part in arguments.parts and part not in ("matrix", "killed") for group in of[part]]
    return [untimed, *timed] if untimed else timed


def started(command: Command, out: Path) -> subprocess.Popen[bytes]:
    environment = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", **os.environ, MARK: command.name}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p)
    if command.visible is not None:
        environment["CUDA_VISIBLE_DEVICES"] = command.visible
    with open(out / f"{command.name}.log", "wb") as log:
        return subprocess.Popen(
            [sys.executable, *command.words], cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
        )


def end_all(name: str) -> int:
    """End every process that a command has left, by its environment, and return how many there were."""
    mark, ended = f"{MARK}={name}".encode(), 0
    for file in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark in file.read_bytes().split(b"\0") and int(file.parent.name) != os.getpid():
                os.kill(int(file.parent.name), signal.SIGKILL)
                ended += 1
        except (OSError, ValueError):  # it ended meanwhile, or is somebody else's
            continue
    return ended


def run(group: list[Command], out: Path, deadline: float) -> list[str]:
    """Run commands side by side, each within its limit; a line about each."""
    left = deadline - time.monotonic()
    if left < LEAST:
        return [f"{command.name}: not run, {max(left, 0):.0f} s are left" for command in group]
    began, processes = time.monotonic(), [(command, started(command, out)) for command in group]
    lines = []
    for command, process in processes:
        limit = min(command.limit, deadline - began)
        try:
            how = f"exit status {process.wait(max(limit - (time.monotonic() - began), 0.1))}"
        except subprocess.TimeoutExpired:
            how = f"stopped at its limit of {limit:.0f} s"
        end_all(command.name)
        process.wait()
        lines.append(f"{command.name}: {how}, {time.monotonic() - began:.0f} s")
    return lines


def shown(out: Path, names: list[str]) -> str:
    """The ends of the logs, and one table of all heads."""
    parts = []
    for name in names:
        log = out / f"{name}.log"
        if log.exists() and not name.startswith(("heads", "alone")):
            text = [line for line in log.read_text(errors="replace").splitlines() if "arn" not in line]
            parts += [f"== {name}", *(line[:180] for line in text[-TAIL:])]
    files = [str(file) for folder in ("alone_*", "heads_*") for file in sorted(out.glob(f"{folder}/parallel.json"))]
    if files:
        words = [sys.executable, "-m", "benchmarks.parallel_report", *files, "--out", str(out)]
        merged = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
        parts += ["== heads", merged.stdout + merged.stderr]
    return "\n".join(parts)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.several_gpus", description=__doc__.splitlines()[0])
    names = ("matrix", "killed", "heads", "gpt", "alone", "qwen3")
    parser.add_argument("--parts", type=lambda s: s.split(","), default=list(names), help=f"of {', '.join(names)}")
    parser.add_argument("--ranks", type=int, default=2, help="GPUs")
    parser.add_argument("--shapes", type=lambda s: s.split(","), default=list(SHAPES), help="NxDxV,... of the heads")
    parser.add_argument("--total", type=float, default=580, help="seconds for everything")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "latest" / "several_gpus")
    arguments = parser.parse_args(words)
    if unknown := [part for part in arguments.parts if part not in names]:
        parser.error(f"no part is called {unknown[0]!r}; there are {', '.join(names)}")
    arguments.out = arguments.out.resolve()
    arguments.out.mkdir(parents=True, exist_ok=True)
    deadline, ran = time.monotonic() + arguments.total, []
    for group in groups(arguments):
        for line in run(group, arguments.out, deadline):
            print(line, flush=True)
        ran += [command.name for command in group]
    print(shown(arguments.out, ran))


if __name__ == "__main__":
    main()
