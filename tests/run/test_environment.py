"""``fusedhead env``: the facts of a bug report, and none that a user would not publish."""

from __future__ import annotations

import json

import pytest

import fusedhead
from fusedhead import options
from fusedhead.run import environment
from fusedhead.run.cli import main
from fusedhead.version import __version__


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
    result = environment.process_environment()
    assert result["device"] == {"failed": "RuntimeError: the driver is too old"}
    assert result["versions"]
