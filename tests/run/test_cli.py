"""The other commands: each has a help, says what it found, and ends as a command should."""

from __future__ import annotations

import os

import pytest

from fusedhead.run.cli import BROKEN_PIPE, COMMANDS, main
from fusedhead.version import __version__


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
