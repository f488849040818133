"""Every kernel of the engine compiles to a binary for each generation of GPUs, with the launch's own constants.

No GPU is needed. The H100 gets heads that launch every kernel there is; the others what a plain head launches, two of
them unless FUSEDHEAD_EVERY_CHIP=1 (benchmarks/results/registers has all cases for all chips). In a process of its
own: here, Triton has been imported as an interpreter (see tests/conftest.py).

Triton's front end runs for every kernel. What follows takes ten times as long and is decided by the IR, the options and
the assembler: `compiled/` has the numbers of what has been compiled, and only a kernel that is not there is compiled,
besides two a chip, drawn at random, that must come out as they are on record. FUSEDHEAD_RECORD_KERNELS=1 compiles all
and writes the record.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is published for Linux only")

from benchmarks.absent_gpu import CHIPS

ROOT = Path(__file__).parents[2]
RECORD = Path(__file__).parent / "compiled"
EVERY = "^(plain, D 768|float8, D 4096|soft cap, D 768|everything, rows of 123)$"  # cases of benchmarks/registers.py
OTHERS = ("B200", "MI300X", "A100", "RTX 5090")  # A10 and L40S run the A100's tiles
TRIED = OTHERS if os.environ.get("FUSEDHEAD_EVERY_CHIP") else OTHERS[:2]  # another generation, another vendor
WRITE = bool(os.environ.get("FUSEDHEAD_RECORD_KERNELS"))


def kernels_of(cases: str, chips: tuple[str, ...], folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The compiled kernels of each chip."""
    cold = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder / "cache")}
    command = [sys.executable, "-m", "benchmarks.registers", "--cases", cases, "--chips", ",".join(chips)]
    known = [] if WRITE else ["--known", str(RECORD), "--again", "2"]
    done = subprocess.run(
        [*command, *known, "--jobs", "1", "--out", str(folder)], cwd=ROOT, env=cold, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    results = {path: json.loads(path.read_text()) for path in folder.glob("*.json")}
    for path in results if WRITE else ():
        shutil.copy(path, RECORD / path.name)
    return {of["origin"]["chip"]["name"]: [k for case in of["cases"].values() for k in case] for of in results.values()}


def fits(kernel: dict[str, Any], chip: str) -> bool:
    """Whether a program has the registers and the shared memory; AMD's have 512 registers a thread."""
    registers = 512 if CHIPS[chip].architecture.startswith("gfx") else 255
    return kernel["registers"] <= registers and kernel["shared"] <= CHIPS[chip].shared * 1024


def is_as_on_record(compiled: list[dict[str, Any]]) -> bool:
    """Whether kernels of the same IR have the same code and numbers as when they were first compiled."""
    rows = [json.loads(path.read_text())["cases"].values() for path in RECORD.glob("*.json")]
    known = {kernel["ir"]: kernel for cases in rows for case in cases for kernel in case}
    return all(kernel == known.get(kernel["ir"], kernel) for kernel in compiled)


def test_float8_heads_are_compiled_for_chips_with_pairs_alone():
    from benchmarks.registers import CASES, cases_of

    assert {name for name, chip in CHIPS.items() if "float8, D 4096" in cases_of(chip, CASES)} == {"H100"}
    assert all("plain, D 4096" in cases_of(chip, CASES) for chip in CHIPS.values())


def test_every_kernel_of_the_engine_compiles_and_fits_on_a_multiprocessor(tmp_path):
    (compiled,) = kernels_of(EVERY, ("H100",), tmp_path).values()
    sources = [path.read_text() for path in (ROOT / "kernels" / "triton_engine").rglob("*.py")]
    defined = {name for text in sources for name in re.findall(r"^def (\w+)_kernel\(", text, re.MULTILINE)}
    assert len(defined) >= 11
    assert {kernel["kernel"].removesuffix(" again") for kernel in compiled} == defined
    assert all(fits(kernel, "H100") for kernel in compiled)
    assert is_as_on_record(compiled)


def test_the_kernels_of_a_plain_head_compile_for_other_generations_and_keep_their_values_in_registers(tmp_path):
    result = kernels_of("^plain, D 768$", TRIED, tmp_path)
    assert set(result) == set(TRIED)
    for chip, compiled in result.items():
        assert len(compiled) >= 8
        assert all(fits(kernel, chip) for kernel in compiled), chip
        assert not [kernel for kernel in compiled if kernel["spilled"]], chip
        assert is_as_on_record(compiled)
