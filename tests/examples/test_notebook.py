"""The notebook's cells run in their order, and what they have printed is committed with them."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest

from fusedhead import backend
from tests.eager_stack import as_it_is

NOTEBOOK = Path(__file__).parents[2] / "examples" / "tour.ipynb"


def cells() -> list[dict[str, Any]]:
    return [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


def test_the_cells_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are rewritten and executed as they are; `make e2e` has a kernel run it."""
    monkeypatch.setattr(backend, "Inductor", lambda *_: as_it_is)
    names: dict[str, Any] = {}
    with contextlib.redirect_stdout(io.StringIO()) as said:
        for cell in cells():
            exec("".join(cell["source"]), names)
    assert "1 head fused, 0 left" in said.getvalue()
    assert "fused: False\nbecause " in said.getvalue()


def test_outputs_are_committed_and_none_is_an_error() -> None:
    assert all(cell["outputs"] for cell in cells()[1:])  # the first imports
    assert not [output for cell in cells() for output in cell["outputs"] if output["output_type"] == "error"]
