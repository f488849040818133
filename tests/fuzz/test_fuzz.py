"""Some seconds of random programs, and the programs that once came out wrong.

``python -m tests.fuzz --seconds 3600 --seed K`` looks further. FUSEDHEAD_FUZZ_SECONDS sets how long the test looks,
FUSEDHEAD_FUZZ_SEED where it begins.
"""

from __future__ import annotations

import os

import pytest

from tests.fuzz.__main__ import fuzz
from tests.fuzz.grammar import draw
from tests.fuzz.minimise import minimise
from tests.fuzz.program import Block, Case, as_test, program, source

SECONDS = float(os.environ.get("FUSEDHEAD_FUZZ_SECONDS", "12"))
SEED = int(os.environ.get("FUSEDHEAD_FUZZ_SEED", "0"))
WORKERS = 2  # the seconds are divided between as many tests, so that two processes share them


@pytest.mark.parametrize("worker", range(WORKERS))
def test_random_programs_do_what_eager_code_does(worker: int) -> None:
    tally = fuzz(SECONDS / WORKERS, seed=SEED + worker, keep_going=False)
    assert not tally.differences, "\n\n".join(tally.differences)
    assert tally.programs


def test_a_seed_is_a_program() -> None:
    assert all(draw(f"0:{n}") == draw(f"0:{n}") for n in range(20))
    assert len({str(draw(f"0:{n}")) for n in range(20)}) == 20


def test_programs_are_python() -> None:
    assert all(callable(program(draw(f"1:{n}"))) for n in range(200))


def test_a_failing_program_is_minimised_to_what_makes_it_fail() -> None:
    noise = tuple(f"z{k} = z * {k}" for k in range(5))
    body = ("z = F.linear(h, w)", *noise, Block("with torch.no_grad():", ("e = z.exp()",)), "l = z3.sum() + 1")
    case = Case(
        {"B": 3, "T": 3, "D": 4, "V": 5}, {"h": "torch.randn(B, D)", "w": "torch.randn(V, D)"}, body, ("l", "z1")
    )
    small = minimise(case, lambda c: "z.exp()" in source(c), seconds=20)
    assert small.body == ("e = z.exp()",)
    assert "def program(" in as_test(small)
