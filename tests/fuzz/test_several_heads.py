"""Programs of several heads give eager's numbers, and the pass reads every one of them.

FUSEDHEAD_SEVERAL_HEADS=2000 python -m pytest tests/fuzz/test_several_heads.py
"""

from __future__ import annotations

import os
import zlib

import pytest
import torch

from tests.fuzz.several_heads import draw, inputs, program
from tests.programs.claims import compiled

PROGRAMS = int(os.environ.get("FUSEDHEAD_SEVERAL_HEADS", "24"))


@pytest.mark.parametrize("seed", [f"heads:{i}" for i in range(PROGRAMS)])
def test_heads_that_meet_in_any_order_give_eagers_numbers(seed: str) -> None:
    torch.manual_seed(zlib.crc32(seed.encode()))
    report = compiled(program(draw(seed)), inputs(seed))  # fails on an error of the pass
    assert all(head.fused for head in report.heads), str(report)
