"""When float8 products serve, in which windows, and what they hold."""

from __future__ import annotations

import pytest
import torch

from fusedhead.kernels.contract import Needs
from fusedhead.kernels.transform.transform import parse
from fusedhead.lowering.plan.float8 import EXACT, MOST_SUMS, float8_candidates, why_exact
from fusedhead.lowering.plan.problem import AUTO, LEAST_MEMORY, MIB, Problem
from fusedhead.lowering.plan.triton import triton_candidates

BF16 = torch.bfloat16
PLAIN = Problem(8192, 128256, 4096, BF16, "cuda", BF16, float8=True)
NOT_SERVED = (
    {"row_scale": False},
    {"needs": Needs(True, False, False, False)},
    {"needs": Needs(True, True, True, False)},
    {"dtype": torch.float16},
    {"transform": parse("addcol:0")},
    {"sums": True},
    {"labels": 2},
    {"hidden": 4100},
    {"hidden": 768},
    {"tokens": 100},
    {"vocab": 1000},
)


def test_a_plain_head_is_served():
    assert why_exact(PLAIN, AUTO) == ""
    assert triton_candidates(PLAIN, AUTO, None)[0][0].algorithm == "float8"


@pytest.mark.parametrize("change", NOT_SERVED, ids=str)
def test_what_is_not_served_keeps_its_plan(change):
    problem = PLAIN._replace(**change)
    assert why_exact(problem, AUTO)
    assert triton_candidates(problem, AUTO, None) == triton_candidates(problem._replace(float8=False), AUTO, None)


def test_every_reason_is_given():
    given = {why_exact(PLAIN._replace(**change), AUTO) for change in NOT_SERVED}
    assert given == {why for why, _ in EXACT}


def test_the_least_memory_and_a_plan_that_was_not_asked_stay_exact():
    for problem, memory in ((PLAIN, LEAST_MEMORY), (PLAIN._replace(float8=False), AUTO)):
        ways, _ = triton_candidates(problem, memory, None)
        assert all(way.algorithm != "float8" for way in ways)


@pytest.mark.parametrize("tokens", [1024, 1500, 8192, 32768, 100_000])
@pytest.mark.parametrize("hidden", [2304, 4096])
def test_windows_cover_the_tokens_within_the_budget(tokens, hidden):
    for budget in (0, 2048 * MIB):
        for way in float8_candidates(PLAIN._replace(tokens=tokens, hidden=hidden), budget):
            windows = way.windows
            assert windows.tokens % 128 == windows.tail_rows % 128 == 0
            assert 0 < windows.tail_rows <= windows.tokens
            assert -(-tokens // windows.tokens) <= MOST_SUMS
            assert not budget or way.workspace_bytes <= budget


def test_what_does_not_fit_is_exact():
    problem = PLAIN._replace(tokens=65536)
    ways, limit = triton_candidates(problem, 300, 300 * MIB)
    assert limit == 300 * MIB
    assert all(way.algorithm != "float8" for way in ways)
