"""A rank dies in the middle of a step: ``python -m benchmarks.killed_rank``, two processes under FSDP2.

Rank 1 kills itself between a forward and its backward. Rank 0 has to end with an error within the process group's
timeout, and not hang: exit status 1 where it does not. Writes what it did into one JSON file.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import machine, measure
from benchmarks.distributed_models import Sizes, fsdp_inside, tokens
from benchmarks.distributed_steps import SHAPES
from benchmarks.ranks import device_of_this_rank

STEP = 3  # in which it happens
TIMEOUT = 20  # of the process group, seconds
ROOM = 35.0  # seconds beyond the timeout, for the error to come through


def rank_main(arguments: argparse.Namespace) -> None:
    """One of the two ranks."""
    rank = int(os.environ["RANK"])
    device = device_of_this_rank(arguments.device)
    store = dist.FileStore(os.environ["RANKS_STORE"], 2)
    limit = timedelta(seconds=arguments.timeout)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=2, timeout=limit)
    sizes = Sizes(arguments.device, arguments.tiny, *((2, 64, 2048) if arguments.tiny else SHAPES["gpt"]))
    torch.manual_seed(0)
    model, step = fsdp_inside(sizes, arguments.backend)
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4)
    for at in range(1000):
        loss = step(*tokens(sizes))
        if rank == 1 and at == STEP:
            os.kill(os.getpid(), signal.SIGKILL)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        measure.wait(device)
        print(f"step {at}", flush=True)


def watch(arguments: argparse.Namespace, words: list[str]) -> dict[str, Any]:
    """Start both ranks, and see how the one that is left ends."""
    with tempfile.TemporaryDirectory() as folder:
        ranks, logs = [], [Path(folder, f"{rank}.log") for rank in range(2)]
        for rank, log in enumerate(logs):
            environment = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
            environment["RANKS_STORE"] = f"{folder}/store"
            environment.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "0")  # NCCL's watchdog waits a minute for its own log
            with open(log, "w") as out:
                command = [sys.executable, "-m", "benchmarks.killed_rank", *words]
                ranks.append(subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT))
        try:
            ranks[1].wait(arguments.start)
            died, hung = time.monotonic(), False
            ranks[0].wait(arguments.timeout + ROOM)
        except subprocess.TimeoutExpired:
            hung = True
        finally:
            for process in ranks:
                process.kill()
        text = logs[0].read_text(errors="replace")
    errors = [line for line in text.splitlines() if "rror" in line or "imeout" in line or "imed out" in line]
    return {
        "exits": [process.wait() for process in ranks],
        "hung": hung,
        "seconds_to_the_error": round(time.monotonic() - died, 1) if not hung else None,
        "timeout": arguments.timeout,
        "steps": text.count("step "),
        "said": errors[:6],
        "tail": text[-1500:],
    }


def ended_well(outcome: dict[str, Any]) -> bool:
    """Whether rank 0 made the steps before, and then ended by itself with an error."""
    return not outcome["hung"] and outcome["exits"][0] != 0 and outcome["steps"] == STEP


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.killed_rank", description=__doc__.splitlines()[0])
    parser.add_argument("--timeout", type=int, default=TIMEOUT, help="of the process group, seconds")
    parser.add_argument("--start", type=float, default=180.0, help="seconds for compiling and the steps before")
    parser.add_argument("--backend", default="fusedhead", help="of torch.compile")
    parser.add_argument("--tiny", action="store_true", help="a size for a CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/latest/killed_rank.json"))
    words = sys.argv[1:] if words is None else words
    arguments = parser.parse_args(words)
    if "RANKS_STORE" in os.environ:
        rank_main(arguments)
        return 0
    outcome = watch(arguments, words)
    origin = machine.origin(torch.device(arguments.device), "benchmarks.killed_rank", words)
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps({"run": origin, **outcome}, indent=1) + "\n")
    how = "ended with an error" if ended_well(outcome) else "NOT AS IT SHOULD BE"
    after = f"after {outcome['seconds_to_the_error']} s, exits {outcome['exits']}"
    print(f"a rank is killed in step {STEP}: the other {how} {after}")
    print("  " + (outcome["said"] or [outcome["tail"][-160:]])[0][:200])
    return int(not ended_well(outcome))


if __name__ == "__main__":
    sys.exit(main())
