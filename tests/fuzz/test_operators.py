"""Operators of torch's own database beside, before, between and behind a head: a sample, and those that found a fault.

The whole runs by ``python -m tests.fuzz.operators_run``.
"""

from __future__ import annotations

import gc
import os
import random
from dataclasses import replace
from types import GeneratorType

import pytest
import torch
from torch import Tensor

from tests.fuzz.operators import PLACES, cases, composite, ops, samples
from tests.fuzz.operators_compared import compare, differs
from tests.fuzz.operators_run import quiet
from tests.op_samples import first_samples

PROGRAMS = int(os.environ.get("FUSEDHEAD_OPERATORS", "20"))
# (op, place) that once made the pass step back, or a number wrong, with the first size known and as a symbol
FOUND = (
    ("kron", "on logits"), ("nn.functional.interpolate", "between"), ("gradient", "on logits"),
    ("nn.functional.rms_norm", "between"), ("addcmul", "between"), ("polygamma", "hidden"),
    ("masked.var", "on logits"), ("narrow", "on logits"),
)  # fmt: skip
SAMPLES = {"addcmul": 3, "polygamma": 3, "narrow": 3}  # of which one found it, else the first


@pytest.fixture(autouse=True)
def silent() -> None:
    quiet()


def test_a_sample_of_the_database_is_what_eager_code_makes_of_it() -> None:
    drawn = random.Random(0)
    known = ops()
    for n in range(PROGRAMS):
        op, place = drawn.choice(known), PLACES[n % len(PLACES)]
        for number, sample in samples(op, 1):
            for case in cases(op, number, sample, (place,)):
                verdict = compare(replace(case, dynamic=n % 2 == 1))
                assert verdict.kind in ("", "skipped"), (case.name, verdict.kind, verdict.detail)


def test_no_composite_op_makes_the_pass_raise() -> None:
    """Any exception of the pass is a defect. Other draws: FUSEDHEAD_COMPOSITE_SEED and FUSEDHEAD_OPERATORS."""
    known = [op for op in ops() if composite(op)]
    assert len(known) > 100
    seed = int(os.environ.get("FUSEDHEAD_COMPOSITE_SEED", "1000"))
    for n in range(seed, seed + PROGRAMS // 2):
        drawn = random.Random(n)
        op, place = drawn.choice(known), drawn.choice(("on logits", "between", "losses"))
        for number, sample in samples(op, drawn.choice((1, 2, 5))):
            for case in cases(op, number, sample, (place,)):
                report = compare(replace(case, dynamic=drawn.random() < 0.5)).report
                assert not report.errors, (case.name, report.errors)


@pytest.mark.parametrize(("name", "place"), FOUND)
def test_an_operator_that_found_a_fault(name: str, place: str) -> None:
    op = next(op for op in ops() if op.name == name)
    for number, sample in samples(op, SAMPLES.get(name, 1)):
        for case in cases(op, number, sample, (place,)):
            for dynamic in (False, True):
                verdict = compare(replace(case, dynamic=dynamic))
                assert verdict.kind == "", (case.name, dynamic, verdict.kind, verdict.detail)


def test_no_generator_of_samples_is_left_suspended() -> None:
    for op in ops():
        if op.name in ("kron", "matmul", "gather", "nn.functional.pad"):
            assert len(first_samples(op, torch.float32, 1)) == 1
    left = [x for x in gc.get_objects() if type(x) is GeneratorType and "sample_inputs" in x.__qualname__]
    assert not [x for x in left if x.gi_frame is not None]


def test_the_comparison_sees_a_wrong_number_a_wrong_dtype_and_a_missing_nan() -> None:
    right: Tensor = torch.tensor([1.0, float("nan")])
    assert not differs(0, right.clone(), right, [])
    assert differs(0, torch.tensor([1.001, float("nan")]), right, [])
    assert differs(0, right.double(), right, [])
    assert differs(0, torch.tensor([1.0, 2.0]), right, [])
