"""Runs a function on several gloo processes of this machine: one interpreter imports torch, compiles once, and forks.

``python -m tests.functional.ranks`` reads lines of JSON, [MODULE:FUNCTION, RANKS, FOLDER, SECONDS], calls each function
on so many ranks inside a process group, and prints the worst exit code. A rank leaves what the function returns in
FOLDER/RANK.pt, and what it prints in FOLDER/said. The process imports what it is to call, and is otherwise as it was.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from datetime import timedelta
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.warm import warm

TIMEOUT = 300  # seconds for all ranks together, unless a test asks for more; a collective gives up after a fifth
ROOT = Path(__file__).parents[2]


@cache
def server() -> subprocess.Popen[str]:
    """The process that forks the ranks of all tests of this one; it ends with it."""
    paths = os.pathsep.join((str(ROOT), str(ROOT / "examples")))
    settings = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": paths}
    command, pipe = [sys.executable, "-m", "tests.functional.ranks"], subprocess.PIPE
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **settings}, stdin=pipe, stdout=pipe, text=True)
    atexit.register(process.communicate)  # closes what it reads
    return process


def on_ranks(function: str, ranks: int, timeout: int = TIMEOUT, may_die: bool = False) -> list[Any]:
    """What ``MODULE:FUNCTION`` returns on each rank. Raises AssertionError with the output where a rank fails.

    With ``may_die`` ranks may end as they like, and None stands for what one that died has not returned.
    """
    with tempfile.TemporaryDirectory() as folder:
        process = server()
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps([function, ranks, folder, timeout]) + "\n")
        process.stdin.flush()
        code = process.stdout.readline()
        files = [Path(folder) / f"{rank}.pt" for rank in range(ranks)]
        if may_die:
            return [torch.load(file, weights_only=False) if file.exists() else None for file in files]
        assert code == "0\n", (Path(folder) / "said").read_text() or f"the ranks ended with {code!r}"
        return [torch.load(file, weights_only=False) for file in files]


def rank_main(function: str, ranks: int, rank: int, folder: str, timeout: int) -> None:
    store = dist.FileStore(os.path.join(folder, "store"), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=timeout // 5))
    torch.set_num_threads(1)  # a fork leaves torch's pool of threads to whoever asks first, and two may
    module, name = function.split(":")
    result = getattr(import_module(module), name)()
    torch.save(result, os.path.join(folder, f"{rank}.pt"))
    dist.barrier()
    dist.destroy_process_group()


def fork_ranks(function: str, ranks: int, folder: str, seconds: int) -> int:
    """The worst exit code of the ranks; those that are not through in time are ended."""
    import_module(function.split(":")[0])
    children = []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                said = os.open(os.path.join(folder, "said"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(said, 1)
                os.dup2(said, 2)
                rank_main(function, ranks, rank, folder, seconds)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    worst, deadline = 0, time.monotonic() + seconds
    while children and time.monotonic() < deadline:
        for child in list(children):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                children.remove(child)
                worst = max(worst, abs(os.waitstatus_to_exitcode(status)))
        time.sleep(0.01)
    for child in children:
        os.kill(child, 9)
        os.waitpid(child, 0)
        worst = 1
    return worst


def main() -> None:
    warm()
    gc.freeze()  # ranks end at once, and look for no garbage in what was imported
    for line in sys.stdin:
        print(fork_ranks(*json.loads(line)), flush=True)
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
