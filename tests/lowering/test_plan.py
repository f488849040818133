"""The planner as a table: sizes, kinds and a budget in, engine, algorithm and windows out."""

from __future__ import annotations

import itertools

import pytest
import torch

from fusedhead.kernels import chips
from fusedhead.kernels.contract import Needs, Windows
from fusedhead.kernels.torch_engine import cpp_library
from fusedhead.kernels.transform.transform import parse
from fusedhead.lowering import engines
from fusedhead.lowering.engines import engine_for
from fusedhead.lowering.plan import plan as plan_module
from fusedhead.lowering.plan.plan import Plan
from fusedhead.lowering.plan.problem import MIB, Problem
from tests.lowering.heads import MULTIPLIED

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
NOTHING = Needs(False, False, False, False)
HIDDEN = Needs(True, False, False, False)
BOTH = Needs(True, True, False, False)
LLAMA, GEMMA, QWEN, GPT2 = (8192, 128256, 4096), (8192, 256000, 2304), (8192, 151936, 1024), (16384, 50304, 768)
WIDENED = {"products": FP32}
SQUARE = parse("fn:mul(z,z);#0|mul(2.0,z);mul(g,#0);#1")
SIZES = ((1, 32000, 512), (7, 507, 123), (1024, 32000, 512), (2048, 50304, 768), LLAMA, (1 << 20, 1 << 18, 8192))


@pytest.fixture(autouse=True, params=[0, 2], ids=["torch ops", "C++ kernel"])
def kernel_threads(request, monkeypatch) -> int:
    """A CPU without a compiler, and one whose C++ kernel has two threads."""
    monkeypatch.setattr(cpp_library, "library", lambda: object() if request.param else None)
    monkeypatch.setattr(torch, "get_num_threads", lambda: request.param)
    return request.param


def plan(n: int, v: int, d: int, dtype: torch.dtype, device: str, **options) -> Plan:
    """The plan where products are computed as on a CPU that multiplies bfloat16, unless the options say otherwise."""
    products = FP32 if dtype == FP16 and device != "cuda" else dtype
    asked = {name: options.pop(name) for name in ("memory", "free_bytes", "whole_below") if name in options}
    return plan_module.plan(Problem(n, v, d, dtype, device, **{"products": products, **options}), **asked)


@pytest.mark.parametrize(
    ("dtype", "device", "engine"),
    [
        (BF16, "cuda", "triton windows"),
        (FP16, "cuda", "triton windows"),
        (FP32, "cuda", "triton windows"),
        (FP64, "cuda", "torch windows"),
        (BF16, "cpu", "torch windows"),
        (FP32, "mps", "torch windows"),
    ],
)
def test_the_engine_follows_device_and_dtype(dtype, device, engine):
    assert engine_for(dtype, device).name == engine


@pytest.mark.parametrize(
    ("hip", "majors", "engine"),
    [
        (None, [9], "triton windows"),
        (None, [9, 8], "triton windows"),
        (None, [10], "triton windows"),
        (None, [12, 9], "triton windows"),
        (None, [7], "torch windows"),
        (None, [8, 7], "torch windows"),
        ("6.4", [9], "triton windows"),  # an MI300 calls itself 9.4
    ],
)
def test_chips_that_no_test_runs_on_take_the_triton_engine_where_a_self_check_agrees(monkeypatch, hip, majors, engine):
    assert chosen_on(monkeypatch, hip, majors, agrees=True) == engine


@pytest.mark.parametrize(("hip", "majors"), [(None, [8]), (None, [9, 8]), (None, [10]), ("6.4", [9])])
def test_chips_whose_self_check_fails_take_the_torch_engine(monkeypatch, hip, majors):
    assert chosen_on(monkeypatch, hip, majors, agrees=False) == "torch windows"


def test_hopper_is_tested_and_asks_for_no_check(monkeypatch):
    assert chosen_on(monkeypatch, None, [9, 9], agrees=False) == "triton windows"


def chosen_on(monkeypatch, hip, majors, agrees: bool) -> str:
    """The engine on a machine with such GPUs, whose self-checks agree or do not."""
    monkeypatch.setattr(chips.self_check, "serves", lambda claim, device: agrees)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(majors))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda at: (majors[at], 0))
    monkeypatch.setattr(engines, "triton_serves", chips.triton_serves.__wrapped__)
    return engine_for(BF16, "cuda").name


@pytest.mark.parametrize(
    ("sizes", "dtype", "device", "options", "algorithm", "windows"),
    [
        (LLAMA, BF16, "cuda", {}, "single pass", Windows(3072, 128256, BF16)),  # 2816 would leave a wave half empty
        ((8192, 151936, 2560), BF16, "cuda", {}, "single pass", Windows(3328, 151936, BF16)),
        ((8192, 152064, 3584), BF16, "cuda", {}, "single pass", Windows(2816, 152064, BF16)),  # 3456 is too much more
        (QWEN, BF16, "cuda", {}, "single pass", Windows(2816, 151936, BF16)),
        (GPT2, BF16, "cuda", {}, "single pass", Windows(5632, 50304, BF16)),
        ((4096, *LLAMA[1:]), BF16, "cuda", {}, "single pass", Windows(2048, 128256, BF16)),
        ((32768, *LLAMA[1:]), BF16, "cuda", {}, "single pass", Windows(3712, 128256, FP32)),
        ((2048, *LLAMA[1:]), BF16, "cuda", {}, "single pass", Windows(2048, 128256, BF16)),
        (GPT2, BF16, "cuda", {"memory": -1}, "single pass", Windows(1664, 50304, FP32)),
        ((512, *LLAMA[1:]), BF16, "cuda", {"memory": -1}, "single pass", Windows(512, 128256, BF16)),
        (LLAMA, BF16, "cuda", {"memory": -1}, "recompute", Windows(2816, 43008, BF16)),
        (LLAMA, BF16, "cuda", {"memory": -1, "linear": False}, "recompute", Windows(8192, 12032, BF16)),
        (LLAMA, BF16, "cuda", {"linear": False}, "recompute", Windows(8192, 16384, BF16)),
        (LLAMA, BF16, "cuda", {"needs": HIDDEN}, "frozen", Windows(2048, 128256, BF16)),
        ((1024, 32000, 512), FP32, "cpu", {}, "single pass", Windows(208, 32000, FP32)),
        ((2048, 50304, 768), FP32, "cpu", {}, "single pass", Windows(416, 50304, FP32)),
        ((1024, 32000, 512), BF16, "cpu", {}, "single pass", Windows(208, 32000, BF16)),
        ((8192, 32000, 512), BF16, "cpu", {}, "single pass", Windows(512, 32000, FP32)),
        # what is multiplied in float32 is kept in the logits' dtype, so that the windows are the same
        ((1024, 32000, 512), BF16, "cpu", WIDENED, "single pass", Windows(208, 32000, BF16)),
        ((8192, 32000, 512), BF16, "cpu", WIDENED, "single pass", Windows(512, 32000, FP32)),
        ((1024, 32000, 512), FP16, "cpu", {}, "single pass", Windows(208, 32000, FP16)),
        # ... but where nothing bounds what float16 would have to hold, no window is kept
        ((1024, 32000, 512), FP16, "cpu", {"transform": SQUARE}, "recompute", Windows(512, 4096, FP16)),
        ((1024, 32000, 512), BF16, "cpu", {"transform": SQUARE, **WIDENED}, "single pass", Windows(208, 32000, BF16)),
        ((1024, 32000, 512), FP32, "cpu", {"needs": HIDDEN}, "frozen", Windows(1024, 2048, FP32)),
        ((1024, 32000, 512), FP32, "cpu", {"needs": NOTHING}, "statistics", Windows(1024, 2048, FP32)),
        ((1024, 32000, 512), BF16, "cpu", {"needs": HIDDEN}, "frozen", Windows(512, 4096, BF16)),
        ((1024, 32000, 512), FP32, "cpu", {"memory": -1}, "recompute", Windows(128, 512, FP32)),
        ((1024, 32000, 512), FP32, "cpu", {"memory": 24}, "single pass", Windows(128, 32000, FP32)),
        ((1024, 32000, 512), FP32, "cpu", {"memory": 8}, "recompute", Windows(256, 1024, FP32)),
        ((1024, 32000, 512), FP32, "cpu", {"row_scale": False}, "recompute", Windows(1024, 2048, FP32)),
    ],
)
def test_the_plan_of(sizes, dtype, device, options, algorithm, windows, kernel_threads):
    chosen = plan(*sizes, dtype, device, **options)
    if chosen.windows.threads:
        assert (dtype, device, kernel_threads) == (FP32, "cpu", chosen.windows.threads)
        return
    assert (chosen.algorithm, chosen.windows) == (algorithm, windows)


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
    assert plan(n, v, d, BF16, device, **options).predicted_flop == products * 2 * n * v * d


@pytest.mark.parametrize("memory", [4, 64, 512, 4096])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(("dtype", "products"), MULTIPLIED)
def test_a_budget_is_kept_or_the_reason_says_that_it_cannot_be(memory, device, dtype, products):
    for sizes, needs, linear in itertools.product(SIZES, (NOTHING, HIDDEN, BOTH), (True, False)):
        chosen = plan(*sizes, dtype, device, products=products, needs=needs, linear=linear, memory=memory)
        assert chosen.predicted_bytes <= memory * MIB or chosen.reason.startswith("no plan fits in")


def test_more_memory_never_costs_more_work():
    for device, (dtype, products), sizes in itertools.product(("cpu", "cuda"), MULTIPLIED, SIZES):
        chosen = [plan(*sizes, dtype, device, products=products, memory=m) for m in (1, 16, 256, 4096, 65536)]
        work = [one.predicted_flop for one in chosen]
        assert work == sorted(work, reverse=True)


def test_the_least_memory_is_no_more_than_any_plan_takes_by_itself():
    for device, (dtype, products), sizes in itertools.product(("cpu", "cuda"), MULTIPLIED, SIZES):
        least, auto = (plan(*sizes, dtype, device, products=products, memory=m) for m in (-1, 0))
        assert least.predicted_bytes <= auto.predicted_bytes


@pytest.mark.parametrize("sizes", [LLAMA, GEMMA, QWEN, GPT2, (32768, *LLAMA[1:])])
def test_training_holds_half_of_the_logits_and_a_quarter_of_many(sizes):
    n, v, _ = sizes
    share = 4 if n == 32768 else 2
    assert plan(*sizes, BF16, "cuda").predicted_bytes <= n * v * 2 // share


@pytest.mark.parametrize("sizes", [LLAMA, GEMMA, QWEN, GPT2, (32768, *LLAMA[1:]), (4096, 128256, 8192)])
@pytest.mark.parametrize("linear", [True, False])
def test_the_least_memory_on_cuda_is_no_more_than_256_mib(sizes, linear):
    assert plan(*sizes, BF16, "cuda", linear=linear, memory=-1).predicted_bytes <= 256 * MIB


@pytest.mark.parametrize("sizes", [LLAMA, GEMMA, QWEN, GPT2, (32768, *LLAMA[1:])])
def test_a_loss_for_any_upstream_holds_at_most_512_mib(sizes):
    assert plan(*sizes, BF16, "cuda", linear=False).predicted_bytes <= 512 * MIB


def test_a_nearly_full_device_lowers_what_auto_takes():
    free = 512 * MIB
    chosen = plan(*LLAMA, BF16, "cuda", free_bytes=free)
    assert chosen.predicted_bytes <= free // 2 < plan(*LLAMA, BF16, "cuda").predicted_bytes


def test_windows_are_positive_and_within_the_head():
    for device, dtype, needs, memory in itertools.product(
        ("cpu", "cuda", "mps"), (FP32, BF16, FP16, FP64), (NOTHING, HIDDEN, BOTH), (-1, 0, 1, 999)
    ):
        for n, v, d in ((0, 1, 1), (1, 1, 1), (3, 70, 5), *SIZES):
            windows = plan(n, v, d, dtype, device, needs=needs, memory=memory).windows
            assert 1 <= windows.tokens <= max(n, 1)
            assert 1 <= windows.vocab <= v
            assert windows.accumulate in (dtype, torch.float32)


def test_a_plan_depends_on_its_arguments_alone():
    assert plan(*GEMMA, BF16, "cuda") == plan(*GEMMA, BF16, "cuda")
    assert plan(*GEMMA, BF16, "cuda").reason.endswith(".") is False
