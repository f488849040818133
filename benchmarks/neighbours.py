"""Other processes that keep cores busy while something is timed, each with matrix products on one thread."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

SIDE = 512
# ends with the process that started it, also where that is killed
PROGRAM = f"""
import os, torch
torch.set_num_threads(1)
a, parent = torch.randn({SIDE}, {SIDE}), os.getppid()
print("busy", flush=True)
while os.getppid() == parent:
    a @ a
"""


@contextmanager
def neighbours(count: int) -> Iterator[None]:
    """Context with ``count`` busy processes."""
    started = [
        subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True) for _ in range(count)
    ]
    try:
        for process in started:
            assert process.stdout is not None
            process.stdout.readline()  # it works from here on
        yield
    finally:
        for process in started:
            process.terminate()
        for process in started:
            process.communicate()
