"""The promises of the torch engine on another CPU than this one: with narrower vectors, without bfloat16 products.

torch, oneDNN and MKL read what they may use when they are loaded, so that the other CPU is another process. Tests in
this process run with the vectors that this CPU has, and `any_cpu` and `multiplied` (conftest) give both answers to
whether bfloat16 is multiplied.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
X86 = platform.machine().lower() in ("x86_64", "amd64")
OTHER = ("avx2", AVX2) if X86 else ("default", {})  # other machines have one width
RUN = """
import sys, pytest, torch
from fusedhead.kernels.torch_engine.product_dtypes import cpu_multiplies_bfloat16
width, *arguments = sys.argv[1:]
assert torch.backends.cpu.get_cpu_capability().lower() == width, torch.backends.cpu.get_cpu_capability()
assert width == "default" or not cpu_multiplies_bfloat16()
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:xdist", *arguments]))
"""
TESTS = (
    "tests/kernels/test_workspace.py::test_a_training_step_holds_less_than_a_quarter_of_the_logits",
    "tests/kernels/test_workspace.py::test_the_planners_prediction_bounds_what_is_held",
    "tests/kernels/test_precision.py",
    "tests/kernels/test_softmax_gradients.py",
)


def test_memory_and_errors_are_as_promised_on_a_cpu_with_narrower_vectors():
    width, settings = OTHER
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    # There no bfloat16 is multiplied, and float16 is widened as bfloat16 is.
    command = [sys.executable, "-c", RUN, width, *TESTS, "-k", "not multiplie and not peaked and not [float16"]
    done = subprocess.run(command, cwd=ROOT, env={**environment, **settings}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
