"""Verdicts on many classes, each in a process of its own with a time limit, remembered between runs.

Processes are forked from one that has imported everything and run nothing. A verdict is kept in the user's cache
folder under the class, the versions of torch and transformers, the stack, and the sources of this package and of
fusedhead. This file does not know what a verdict says.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

import fusedhead
from tests.sweep_transformers.verdict import Verdict, judge


def sources() -> str:
    """A hash of everything that a verdict depends on besides the installed packages."""
    digest = hashlib.sha256()
    for folder in (Path(fusedhead.__file__).parent, Path(__file__).parent):
        for file in sorted(folder.rglob("*.py")):
            digest.update(str(file.relative_to(folder)).encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def folder() -> Path:
    import transformers

    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "fusedhead" / "sweep" / f"{transformers.__version__}-{torch.__version__}-{sources()}"


def work(name: str, stack: str, to: Connection) -> None:
    """In the child: the verdict, through the pipe."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with open(os.devnull, "w") as nowhere:  # what models print is of no interest
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
        torch.set_num_threads(1)
        to.send(asdict(judge(name, stack)))
    to.close()
    os._exit(0)


@dataclass
class Running:
    process: Any
    end: float  # when its time is over, by time.monotonic


def judged(names: Sequence[str], stack: str, jobs: int, limit: float) -> Iterator[tuple[Verdict, bool]]:
    """Verdicts as they come, each with whether it was remembered."""
    remembered, todo = folder(), []
    remembered.mkdir(parents=True, exist_ok=True)
    for name in names:
        file = remembered / f"{name}.{stack}.json"
        if file.exists():
            yield Verdict(**json.loads(file.read_text())), True
        else:
            todo.append(name)
    for verdict in fresh(todo, stack, jobs, limit):
        if verdict.kind != "stopped":
            partial = remembered / f".{verdict.name}.{os.getpid()}"
            partial.write_text(json.dumps(asdict(verdict)))
            partial.replace(remembered / f"{verdict.name}.{stack}.json")
        yield verdict, False


def fresh(names: Sequence[str], stack: str, jobs: int, limit: float) -> Iterator[Verdict]:
    sys.stdout.flush()
    context = multiprocessing.get_context("fork")
    waiting, running = list(reversed(names)), dict[Connection, tuple[str, Running]]()
    while waiting or running:
        while waiting and len(running) < jobs:
            name = waiting.pop()
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=work, args=(name, stack, theirs), daemon=True)
            process.start()
            theirs.close()
            running[ours] = (name, Running(process, time.monotonic() + limit))
        for ready in wait(list(running), timeout=0.5):
            assert isinstance(ready, Connection)
            name, one = running.pop(ready)
            yield received(name, ready, one.process)
        for pipe, (name, one) in list(running.items()):
            if time.monotonic() > one.end:
                one.process.kill()
                one.process.join()
                del running[pipe]
                yield Verdict(name, "stopped", f"after {limit:.0f} s", seconds=limit)


def received(name: str, pipe: Connection, process: Any) -> Verdict:
    try:
        verdict = Verdict(**pipe.recv())
    except EOFError:
        process.join()
        verdict = Verdict(name, "fails", f"its process ended with {process.exitcode}")
    process.join()
    pipe.close()
    return replace(verdict)
