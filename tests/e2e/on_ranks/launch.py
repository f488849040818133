"""Starts a program of this folder on two ranks under torchrun, as a user would, with and without ``fusedhead run``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def losses_and_report(program: str, folder: Path, ours: bool) -> tuple[list[float], str]:
    """What a program logs, and what is printed. ``program``: a file of this folder, and words for it."""
    name, *words = program.split()
    out = folder / f"{'ours' if ours else 'plain'}.json"
    script = str(HERE / f"{name}.py")
    command = ["-m", "fusedhead", "run", script] if ours else [script]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, (str(HERE.parents[2]), os.environ.get("PYTHONPATH", "")))),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    done = subprocess.run(
        [*torchrun, *command, str(out), *words],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return json.loads(out.read_text()), done.stdout + done.stderr
