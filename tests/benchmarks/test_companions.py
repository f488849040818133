"""The pass's own time and the whole-model runs: that their harness counts and reads what it says it does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import compile_time, end_to_end, trainer


def test_the_pass_is_timed_and_compiles_as_often_as_inductor(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "compile.json"
    sizes = ["--layers", "1", "--width", "16", "--vocab", "64", "--repeat", "1"]
    result = compile_time.main(["--device", "cpu", *sizes, "--json", str(file)])
    assert result["inductor"]["graphs"] == result["fusedhead"]["graphs"]
    assert result["fusedhead"]["pass_ms"] > result["inductor"]["pass_ms"]
    assert json.loads(file.read_text())["fusedhead"] == result["fusedhead"]
    assert "pass ms" in capsys.readouterr().out


def test_a_line_reads_the_numbers_of_both_workers() -> None:
    gpt = {"step_seconds": 0.5, "peak_bytes": 3 << 30, "losses": [5.0, 4.0], "note": ""}
    assert end_to_end.line("gpt", "inductor", "4x512", gpt)[3:7] == ("500.0", "4,096", "3.00", "4.000")
    qwen3 = {"largest_batch": 6, "peaks": {}}
    assert end_to_end.line("qwen3", "liger", "4x512", qwen3)[7:9] == ("6", "3,072")


def test_a_run_that_fails_says_why() -> None:
    numbers = end_to_end.run(["-c", "raise SystemExit('no such model')"], limit=60)
    assert numbers["note"] == "exit code 1: no such model"


def test_a_run_that_takes_too_long_is_stopped() -> None:
    numbers = end_to_end.run(["-c", "import time; time.sleep(60)"], limit=0.5)
    assert numbers["note"] == "took longer than 0 s"


def test_a_trainer_line_and_what_the_command_said() -> None:
    numbers = {
        "step_ms": 100.0,
        "tokens_per_second": 81920.0,
        "peak_bytes": 15 << 30,
        "warm_up_seconds": 90.4,
        "losses": [9.0],
    }
    assert trainer.line("fusedhead", numbers)[1:6] == ("100.0", "81,920", "15.00", "90", "9.0000")
    assert trainer.line("liger", {"note": "exit code 1"})[-1] == "exit code 1"
    assert trainer.summary(["{'loss': 9.0}", "fusedhead: 1 head fused", "  yes"]) == [
        "fusedhead: 1 head fused",
        "  yes",
    ]
