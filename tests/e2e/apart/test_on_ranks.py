"""torchtitan and torchtune on two ranks: blocks and loss are compiled, and the eager head between them is fused."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.on_ranks.launch import losses_and_report


@pytest.mark.parametrize("program", ["titan", "tune", "tune tied"])
def test_a_recipe_on_two_ranks(program: str, tmp_path: Path) -> None:
    plain, _ = losses_and_report(program, tmp_path, ours=False)
    fused, said = losses_and_report(program, tmp_path, ours=True)
    assert len(fused) == 3
    assert fused == pytest.approx(plain, abs=2e-4)
    assert "head fused" in said or "heads fused" in said
