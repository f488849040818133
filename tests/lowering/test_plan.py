"""The planner: budgets are kept, more memory never costs work, and a plan depends on its arguments alone."""

from __future__ import annotations

import itertools

import pytest
import torch

from fusedhead.kernels.contract import Needs
from fusedhead.lowering.plan.problem import MIB
from tests.lowering.heads import MULTIPLIED
from tests.lowering.problems import (
    BF16,
    BOTH,
    FP16,
    FP32,
    FP64,
    GEMMA,
    HIDDEN,
    LLAMA,
    NOTHING,
    SIZES,
    planned,
)

pytestmark = pytest.mark.usefixtures("kernel_threads")


@pytest.mark.parametrize(
    ("options", "products"),
    [
        ({}, 3),
        ({"needs": HIDDEN}, 2),
        ({"needs": Needs(False, True, False, False)}, 2),
        ({"needs": NOTHING}, 1),
        ({"memory": -1}, 4),
        ({"linear": False}, 3),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_predicted_work_counts_products(options, products, device):
    n, v, d = LLAMA
    assert planned(n, v, d, BF16, device, **options).predicted_flop == products * 2 * n * v * d


@pytest.mark.parametrize("memory", [4, 64, 512, 4096])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(("dtype", "products"), MULTIPLIED)
def test_a_budget_is_kept_or_the_reason_says_that_it_cannot_be(memory, device, dtype, products):
    for sizes, needs, linear in itertools.product(SIZES, (NOTHING, HIDDEN, BOTH), (True, False)):
        chosen = planned(*sizes, dtype, device, products=products, needs=needs, linear=linear, memory=memory)
        assert chosen.predicted_bytes <= memory * MIB or chosen.reason.startswith("no plan fits in")


def test_more_memory_never_costs_more_work():
    for device, (dtype, products), sizes in itertools.product(("cpu", "cuda"), MULTIPLIED, SIZES):
        chosen = [planned(*sizes, dtype, device, products=products, memory=m) for m in (1, 16, 256, 4096, 65536)]
        work = [one.predicted_flop for one in chosen]
        assert work == sorted(work, reverse=True)


def test_the_least_memory_is_no_more_than_any_plan_takes_by_itself():
    for device, (dtype, products), sizes in itertools.product(("cpu", "cuda"), MULTIPLIED, SIZES):
        least, auto = (planned(*sizes, dtype, device, products=products, memory=m) for m in (-1, 0))
        assert least.predicted_bytes <= auto.predicted_bytes


def test_windows_are_positive_and_within_the_head():
    for device, dtype, needs, memory in itertools.product(
        ("cpu", "cuda", "mps"), (FP32, BF16, FP16, FP64), (NOTHING, HIDDEN, BOTH), (-1, 0, 1, 999)
    ):
        for n, v, d in ((0, 1, 1), (1, 1, 1), (3, 70, 5), *SIZES):
            windows = planned(n, v, d, dtype, device, needs=needs, memory=memory).windows
            assert 1 <= windows.tokens <= max(n, 1)
            assert 1 <= windows.vocab <= v
            assert windows.accumulate in (dtype, torch.float32)


def test_a_plan_depends_on_its_arguments_alone():
    assert planned(*GEMMA, BF16, "cuda") == planned(*GEMMA, BF16, "cuda")
    assert planned(*GEMMA, BF16, "cuda").reason.endswith(".") is False
