"""A few classes of the sweep over the language models of transformers (``python -m tests.sweep_transformers``)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# soft-capped logits, a warning between head and loss, two heads
SOME = "Gemma2ForCausalLM|GPT2LMHeadModel|MoshiForCausalLM"


def swept(folder: Path, *more: str) -> list[dict[str, object]]:
    command = [
        sys.executable,
        "-m",
        "tests.sweep_transformers",
        "--jobs",
        "1",
        "--limit",
        "600",
        "--out",
        str(folder),
        *more,
    ]
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads((folder / "sweep_transformers.json").read_text())["rows"]
    assert all(row["name"] in (folder / "sweep_transformers.md").read_text() for row in rows)
    return rows


@pytest.mark.parametrize("more", [["--only", f"^({SOME})$", "--inductor"], ["--sample", "6"]])
def test_a_sample_of_the_models_is_fused_and_right(more: list[str], tmp_path: Path) -> None:
    kinds = [row["kind"] for row in swept(tmp_path, *more)]
    assert set(kinds) <= {"fused", "no head", "no loss", "not built"}
    assert kinds.count("fused") >= len(kinds) - 1 >= 2
