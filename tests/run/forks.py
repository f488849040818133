"""Many runs of the command for one import of torch, and one first compilation: one process forks a child a run."""

from __future__ import annotations

import inspect
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import PIPE
from typing import NamedTuple, Protocol

from tests.warm import warm

FORKS = """
import atexit, json, os, sys, torch
from fusedhead.run.cli import main
warm()

ended = [1]  # the exit code, as far as it is known

def end():
    # After the program's threads and what it has registered: to take a process apart that knows torch takes seconds.
    if ended:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(ended[0])

def child(arguments):
    atexit.register(end)
    try:
        sys.exit(main(arguments))
    except SystemExit as stop:
        ended[0] = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        raise
    except KeyboardInterrupt:  # whose exit code is Python's to give
        ended.clear()
        raise

for line in sys.stdin:
    arguments, folder, out, err, environment = json.loads(line)
    pid = os.fork()
    if pid == 0:
        torch.set_num_threads(1)  # a fork leaves torch's pool of threads to whoever asks first, and two may
        os.chdir(folder)
        os.environ.update(environment)
        os.dup2(os.open(out, os.O_WRONLY | os.O_CREAT), 1)
        os.dup2(os.open(err, os.O_WRONLY | os.O_CREAT), 2)
        child(arguments)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Outcome(NamedTuple):
    code: int  # of the exit
    out: str
    err: str


class Ours(Protocol):
    def __call__(self, *arguments: str, cwd: Path, command: str = "run", **environment: str) -> Outcome: ...


def of_the_program(line: str) -> bool:
    """Whether a line of stderr tells of the program: torch may say that it finds CUDA but no GPU."""
    return "No CUDA runtime is found" not in line


@contextmanager
def forks() -> Iterator[Ours]:
    """``fusedhead run``, or another command, as a function of arguments, folder, and more of the environment."""
    started = [sys.executable, "-c", inspect.getsource(warm) + FORKS]
    with (
        subprocess.Popen(started, stdin=PIPE, stdout=PIPE, text=True) as process,
        tempfile.TemporaryDirectory() as written,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        count = itertools.count()

        def run(*arguments: str, cwd: Path, command: str = "run", **environment: str) -> Outcome:
            number = next(count)
            out, err = Path(written, f"{number}.out"), Path(written, f"{number}.err")
            process.stdin.write(json.dumps([[command, *arguments], str(cwd), str(out), str(err), environment]) + "\n")
            process.stdin.flush()
            code = int(process.stdout.readline())
            return Outcome(code, out.read_text(), "".join(filter(of_the_program, err.read_text().splitlines(True))))

        yield run
        process.stdin.close()
