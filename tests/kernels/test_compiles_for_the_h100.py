"""Every kernel of the engine compiles to a binary for an H100, with the launch's own constants and no GPU.

In a process of its own: here, Triton has been imported as an interpreter (see tests/conftest.py).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is published for Linux only")

ROOT = Path(__file__).parents[2]
CASES = "^(plain, D 768|soft cap|everything, rows of 123)$"  # of benchmarks/registers.py


def test_every_kernel_of_the_engine_compiles_and_fits_on_a_multiprocessor(tmp_path):
    cold = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "benchmarks.registers", "--cases", CASES, "--jobs", "1", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=cold, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    cases = json.loads((tmp_path / "registers.json").read_text())["cases"]
    compiled = [kernel for case in cases.values() for kernel in case]
    sources = [path.read_text() for path in (ROOT / "kernels").glob("*.py")]
    defined = {name for text in sources for name in re.findall(r"^def (\w+)_kernel\(", text, re.MULTILINE)}
    assert len(defined) >= 11
    assert {kernel["kernel"].removesuffix(" again") for kernel in compiled} == defined
    assert all(kernel["registers"] <= 255 and kernel["shared"] <= 227 * 1024 for kernel in compiled)
