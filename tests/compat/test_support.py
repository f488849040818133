"""The README's table of support is `support.csv`, and that fits what the repository installs, allows and can parse."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import torch

from fusedhead.report.coverage import between_markers
from tests.compat.support import MARKERS, TESTED, pythons, rows, table

ROOT = Path(__file__).parents[2]
README, PYPROJECT, REQUIREMENTS = (
    (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "pyproject.toml", "requirements.txt")
)


def on_a_cpu() -> set[str]:
    return {row.torch for row in rows() if row.tested == "run" and row.chip.endswith("CPU")}


def named(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    assert match is not None, pattern
    return match[1]


def test_the_table_of_the_readme_is_the_file_s() -> None:
    assert between_markers(README, MARKERS, table()) == README, "python -m tests.compat --write README.md"


def test_every_row_says_what_tested_means() -> None:
    assert {row.tested for row in (*rows(), *pythons())} <= set(TESTED)
    assert all(all(row) for row in (*rows(), *pythons()))


def test_the_newest_and_the_oldest_torch_are_in_the_table() -> None:
    assert named(r"\ntorch==([\d.]+)", REQUIREMENTS) in on_a_cpu()
    oldest = named(r"torch>=([\d.]+)", PYPROJECT)
    assert f"{oldest}.0" in on_a_cpu()


def test_the_torch_that_runs_this_is_in_the_table() -> None:
    assert torch.__version__.partition("+")[0] in {row.torch for row in rows()}


def test_every_python_that_is_allowed_is_in_the_table() -> None:
    listed = sorted(python for row in pythons() for python in row.python.split(", "))
    assert listed == sorted(re.findall(r"Python :: (3\.\d+)", PYPROJECT))


def test_every_source_is_in_the_syntax_of_the_oldest_python() -> None:
    """That of the standard library is held by mypy, whose target is the same."""
    least = named(r'requires-python = ">=([\d.]+)"', PYPROJECT)
    assert named(r'python_version = "([\d.]+)"', PYPROJECT) == least
    assert named(r'target-version = "py(\d+)"', PYPROJECT) == least.replace(".", "")
    version = tuple(map(int, least.split(".")))
    for folder in ("fusion_pass", "lowering", "kernels"):
        for path in (ROOT / folder).rglob("*.py"):
            ast.parse(path.read_text(encoding="utf-8"), feature_version=version)
    assert sys.version_info >= version
