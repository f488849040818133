"""Two versions of Triton side by side: the table, and that it compares two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import triton_versions


def turn(triton: str, number: int, **ms: float) -> dict[str, Any]:
    rows = [{"case": "64x16x512:bfloat16", "task": "train", "contender": name, "ms": x} for name, x in ms.items()]
    return {
        "triton": triton,
        "turn": number,
        "runs": [],
        "rows": [*rows, rows[0] | {"contender": "inductor", "ms": None}],
    }


def test_a_row_shows_the_mean_of_the_turns_of_each_version() -> None:
    found = [turn("3.6.0", 0, fusedhead=1.0), turn("3.9.0", 0, fusedhead=3.0), turn("3.9.0", 1, fusedhead=3.3)]
    heading, _, row = triton_versions.table(found)
    assert heading.startswith("| N, D, V | task | fusedhead 3.6.0 | fusedhead 3.9.0 | inductor 3.6.0 |")
    assert row == "| 64, 16, 512 | train | 1.00 | 3.15 |  |  |  |  | 10.0% |"


def test_one_version_alone_is_not_compared_with_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_versions, "ASKED", "print('3.9.0')")
    with pytest.raises(SystemExit, match="both versions of Triton are"):
        triton_versions.environments(tmp_path, tmp_path)


def test_each_version_has_caches_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_versions, "ASKED", "import os; print(len(os.environ['PYTHONPATH'].split(':')))")
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    (installed, first), (other, second) = triton_versions.environments(tmp_path, tmp_path / "caches").items()
    assert (installed, other) == ("1", "2")
    assert second["PYTHONPATH"] == f"{tmp_path}:/somewhere"
    for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
        assert first[name] != second[name]
