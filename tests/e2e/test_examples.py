"""The examples that need other packages, and the notebook, as a user runs them; and the documentation's blocks."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.docs.blocks import blocks, pages
from tests.docs.test_python_blocks import README, namespace, runs

EXAMPLES = Path(__file__).parents[2] / "examples"
NEEDY = [page for page in pages() if any(block.needs for block in blocks(page))]


def printed(name: str, *options: str) -> str:
    command = [sys.executable, str(EXAMPLES / name), *options]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.parametrize("name", ["hf_trainer.py", "trl_orpo.py", "lightning_module.py"])
def test_an_example_learns_on_a_fused_head(name: str) -> None:
    said = printed(name, "--steps", "6", "--vocab", "2048")
    assert "1 head fused, 0 left" in said
    losses = [float(loss) for loss in re.findall(r"'loss': '?([\d.]+)", said)]
    if name == "lightning_module.py":
        losses = [float(loss) for loss in said.splitlines()[0].split()[1:]]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", ["classifier.py", "distill.py", "evaluate.py", "sasrec.py"])
def test_an_example_runs_through_inductor(name: str) -> None:
    assert "never built" in printed(name, "--steps", "4")


def test_the_notebook_runs_in_a_kernel() -> None:
    notebook = nbformat.read(EXAMPLES / "tour.ipynb", as_version=4)
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()


@pytest.mark.parametrize("page", NEEDY, ids=lambda page: page.name)
def test_blocks_that_need_other_packages_run(page: Path) -> None:
    names = namespace()
    for block in blocks(README):
        if block.language == "python":
            runs(block, names)
    for block in blocks(page):
        if block.language == "python":
            runs(block, names)
