"""Runs a function on several gloo processes of this machine: one interpreter imports torch, then forks the ranks.

``python -m tests.functional.ranks MODULE:FUNCTION RANKS FOLDER SECONDS`` calls it on each rank, inside a process group,
and leaves what it returns in FOLDER/RANK.pt: a value, or the exception as text.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = 120  # seconds for all ranks together, unless a test asks for more; a collective gives up after a fifth
ROOT = Path(__file__).parents[2]


def on_ranks(function: str, ranks: int, timeout: int = TIMEOUT) -> list[Any]:
    """What ``MODULE:FUNCTION`` returns on each rank. Raises AssertionError with the output where a rank fails."""
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-m", "tests.functional.ranks", function, str(ranks), folder, str(timeout)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=2 * timeout)
        assert done.returncode == 0, done.stdout + done.stderr
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(ranks)]


def rank_main(function: str, ranks: int, rank: int, folder: str, timeout: int) -> None:
    store = dist.FileStore(os.path.join(folder, "store"), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=timeout // 5))
    module, name = function.split(":")
    found = getattr(import_module(module), name)()
    torch.save(found, os.path.join(folder, f"{rank}.pt"))
    dist.barrier()
    dist.destroy_process_group()


def main(function: str, ranks: str, folder: str, seconds: str) -> int:
    torch.set_num_threads(1)
    import_module(function.split(":")[0])
    children = []
    for rank in range(int(ranks)):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                rank_main(function, int(ranks), rank, folder, int(seconds))
                code = 0
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    worst, deadline = 0, time.monotonic() + int(seconds)
    while children and time.monotonic() < deadline:
        for child in list(children):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                children.remove(child)
                worst = max(worst, os.waitstatus_to_exitcode(status))
        time.sleep(0.01)
    for child in children:
        os.kill(child, 9)
        worst = 1
    return worst


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
