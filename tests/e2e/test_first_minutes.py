"""A stranger's first minutes: the wheel is installed, examples are run, a report is written and opened.

The wheel stands in a folder of its own in front of what is installed, so that nothing of the clone's package is used.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BUILD = "import sys, setuptools.build_meta as backend; backend.build_wheel(sys.argv[1])"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source, out = tmp_path_factory.mktemp("source") / "fusedhead", tmp_path_factory.mktemp("installed")
    unwanted = shutil.ignore_patterns("__pycache__", ".*", "build", "*.egg-info", "results", "tests")
    shutil.copytree(ROOT, source, ignore=unwanted)
    subprocess.run([sys.executable, "-c", BUILD, str(out)], cwd=source, check=True, capture_output=True)
    (wheel,) = out.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target"]
    subprocess.run([*pip, str(out / "site"), str(wheel)], check=True, capture_output=True)
    return out / "site"


def ran(installed: Path, folder: Path, *words: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout + run.stderr


def test_what_runs_is_the_wheel(installed: Path, tmp_path: Path) -> None:
    said = ran(installed, tmp_path, "-c", "import fusedhead; print(fusedhead.__file__, fusedhead.__version__)")
    assert str(installed) in said


@pytest.mark.parametrize("name", ["classifier.py", "distill.py", "evaluate.py"])
def test_an_example_runs_and_says_what_was_fused(name: str, installed: Path, tmp_path: Path) -> None:
    said = ran(installed, tmp_path, str(ROOT / "examples" / name), "--steps", "2")
    assert ", 0 left" in said
    assert "never built" in said


def test_a_report_is_written_that_a_browser_opens(installed: Path, tmp_path: Path) -> None:
    program = [str(ROOT / "examples" / "classifier.py"), "--steps", "2", "--backend", "inductor"]
    said = ran(installed, tmp_path, "-m", "fusedhead", "run", "--report", "heads.html", *program)
    assert "1 head fused, 0 left" in said
    page = (tmp_path / "heads.html").read_text(encoding="utf-8")
    assert page.lstrip().lower().startswith("<!doctype html>")
    assert "classifier.py" in page
