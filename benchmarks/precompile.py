"""Fill the compilers' caches on disk before anything is measured: one process a case, side by side.

Compilation is most of a benchmark's first run and uses one core; a machine with a GPU has many. Each process
calls every contender once at its case and throws the results away, so failures do not matter here: they come
back, with a reason, when the contender is measured.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.shapes import Case


def side_by_side(words: list[str], cases: list[Case], seconds: float) -> None:
    """Run ``benchmarks.head`` with ``words`` and ``--once`` for every case; stop all after ``seconds``."""
    began = time.monotonic()
    share = max(1, (os.cpu_count() or 1) // len(cases))
    environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": str(share), "OMP_NUM_THREADS": "1"}
    words = [word for word in words if word != "--precompile"]
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for number, case in enumerate(cases):
            tasks = [
                "--once",
                "--shapes",
                case.text,
                "--data",
                "random",
                "--out",
                str(Path(folder, str(number))),
            ]
            command = [sys.executable, "-m", "benchmarks.head", *words, *tasks]
            children.append(
                subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
            )
        for child in children:
            try:
                child.wait(max(0.0, began + seconds - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
    print(f"{len(cases)} cases precompiled in {time.monotonic() - began:.0f} s", file=sys.stderr)
