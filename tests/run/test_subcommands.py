"""The other commands: each has a help, says what it found, and ends as a command should."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fusedhead
from fusedhead import Report, options
from fusedhead.run import environment, explain_function
from fusedhead.run.cli import BROKEN_PIPE, COMMANDS, main
from fusedhead.version import __version__
from tests.eager_stack import backend
from tests.run.forks import Ours
from tests.run.programs import COMPILED, EAGER, write


def test_no_command_shows_the_help_with_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n    {name} " in shown for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_help_of_its_own(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"usage: fusedhead {command}" in capsys.readouterr().out


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert (stop.value.code, capsys.readouterr().out) == (0, f"fusedhead {__version__}\n")


def test_a_pipe_that_nobody_reads_is_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as pipe:
        monkeypatch.setattr("sys.stdout", pipe)
        assert main(["rules"]) == BROKEN_PIPE
    assert capsys.readouterr().err == ""


def test_tuning_without_a_gpu_fails_and_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["tune"]) != 0
    assert "no GPU here" in capsys.readouterr().err


def test_rules_are_those_of_the_module(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rules", "--sentences"]) == 0
    assert "runs over tokens" in capsys.readouterr().out


def test_env_has_what_a_report_of_a_fault_needs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FUSEDHEAD_MEMORY", "64")
    monkeypatch.setenv("FUSEDHEAD_MEMRY", "65")
    monkeypatch.setenv("SECRET_TOKEN", "not to be shown")
    options.check_environment.cache_clear()
    assert main(["env"]) == 0
    shown = capsys.readouterr().out
    for line in (f"fusedhead  {' ' * 4}{__version__}", "torch", "64 (FUSEDHEAD_MEMORY)", "65 (nothing reads it)",
                 "tiles.json", "Inductor's cache", "torch._TorchCompileInductorWrapper.__call__"):  # fmt: skip
        assert line.split("  ")[-1].strip() in shown
    assert "not to be shown" not in shown
    assert fusedhead.changes() == []  # looking changes nothing
    assert main(["env", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["versions"]["torch"]
    options.check_environment.cache_clear()


def test_env_goes_on_where_a_part_of_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> bool:
        raise RuntimeError("the driver is too old")

    monkeypatch.setattr("torch.cuda.is_available", broken)
    found = environment.process_environment()
    assert found["device"] == {"failed": "RuntimeError: the driver is too old"}
    assert found["versions"]


STEPS = """
import torch, torch.nn.functional as F

def loss(h, w, y):
    return F.cross_entropy(h @ w.T, y)

def parts():
    return loss, torch.randn(8, 16), torch.randn(64, 16), torch.randint(0, 64, (8,))

def itself():
    a, b = torch.ones(8, 16), torch.ones(64, 16)
    return F.cross_entropy(a @ b.T, torch.zeros(8, dtype=torch.long))

number = 3
"""


def explain_eagerly(fn: Callable[..., Any]) -> Callable[..., Report]:
    """`explain` without Inductor."""
    report = Report()
    compiled = torch.compile(fn, backend=backend(report.extend))

    def explained(*args: Any) -> Report:
        compiled(*args)
        return report

    return explained


def test_explain_compiles_what_a_function_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, STEPS, "steps_to_explain.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(explain_function, "explain", explain_eagerly)
    for function in ("parts", "itself"):
        assert main(["explain", f"steps_to_explain:{function}", "--graphs"]) == 0
        shown = capsys.readouterr().out
        assert shown.startswith("fusedhead: 1 head fused, 0 left, in 1 graph")
        assert "fusedhead.head_stats" in shown  # the graph after
    with pytest.raises(SystemExit):
        main(["explain", "steps_to_explain:number"])
    assert "this is a int, and no function" in capsys.readouterr().err


def test_estimate_follows_a_program_until_it_asks_for_a_number(tmp_path: Path, ours: Ours) -> None:
    big = COMPILED.replace("vocab=512, width=32", "vocab=50304, width=4096")
    path = write(tmp_path, big)
    line = 1 + next(at for at, text in enumerate(path.read_text().splitlines()) if "loss.item()" in text)
    run = ours("--chip", "h100", "program.py", cwd=tmp_path, command="estimate", FUSEDHEAD_MIN_LOGITS="0")
    assert run.code == 0, run.err
    assert "1 head in 1 graph" in run.out
    assert "N=32 D=4096 V=50304 float32: cross_entropy(mean, ignore_index=-100)" in run.out
    assert f"not followed further: program.py:{line}: DataDependentOutputException" in run.out


def test_estimate_says_what_to_do_where_nothing_is_compiled(tmp_path: Path, ours: Ours) -> None:
    write(tmp_path, EAGER.replace('print(f"{loss.item():.4f}")', "pass"))
    plain = ours("program.py", cwd=tmp_path, command="estimate")
    assert "--compile-eager looks at its models" in plain.err
    run = ours("--compile-eager", "program.py", cwd=tmp_path, command="estimate", FUSEDHEAD_MIN_LOGITS="0")
    assert run.code == 0, run.err
    assert "1 head in 1 graph" in run.out
