"""``fusedhead explain``: a function is compiled and reported, and anything else refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fusedhead import Report
from fusedhead.run import explain_function
from fusedhead.run.cli import main
from tests.eager_stack import backend
from tests.run.programs import write

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
