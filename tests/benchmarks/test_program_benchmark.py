"""The benchmark of programs runs on the CPU at small sizes, and its row programs compute what eager code does."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import programs
from benchmarks.shapes import Case


def test_it_writes_a_row_a_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["programs", "--shapes", "16x8x600:float32", "--programs", "plain|jsd", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--out", str(tmp_path)])
    programs.main()
    rows = json.loads((tmp_path / "programs.json").read_text())["rows"]
    assert [row["program"] for row in rows] == ["plain", "jsd"]
    assert "| jsd |" in (tmp_path / "programs.md").read_text()


@pytest.mark.parametrize("name", ["reverse_kl", "jsd", "top64_distilled", "dpo_with_entropy", "grpo_with_kl"])
def test_what_trainers_compute_is_what_eager_code_computes(name: str) -> None:
    program, case, device = getattr(programs, name), Case(16, 8, 600, "float32"), torch.device("cpu")
    eager = programs.step_of(program, "eager", case, device)()
    for theirs, ours in zip(eager, programs.step_of(program, "fusedhead", case, device)()):
        torch.testing.assert_close(ours, theirs)
