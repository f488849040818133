"""Unmodified programs of real packages on two ranks: ``fusedhead run`` gives the same losses, with the head fused."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.on_ranks.launch import losses_and_report

PROGRAMS = ("accelerate_loop", "trainer", "lightning_module")


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_on_two_ranks(program: str, tmp_path: Path) -> None:
    plain, _ = losses_and_report(program, tmp_path, ours=False)
    fused, said = losses_and_report(program, tmp_path, ours=True)
    assert len(fused) == 3
    assert fused == pytest.approx(plain, abs=2e-4)
    assert "fusedhead: 1 head fused" in said
