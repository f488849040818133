"""The plans of the Triton engine as a table: windows that fill waves of tiles, within half of the logits' bytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusedhead.kernels.contract import Windows, even_size
from fusedhead.lowering.plan.problem import MIB
from tests.lowering.problems import (
    BF16,
    FP16,
    FP32,
    GEMMA,
    GPT2,
    HIDDEN,
    LLAMA,
    QWEN,
    planned,
)


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
        (LLAMA, BF16, "cuda", {"memory": -1, "linear": False}, "recompute", Windows(8192, 11776, BF16)),
        (LLAMA, BF16, "cuda", {"linear": False}, "recompute", Windows(8192, 16128, BF16)),
        (LLAMA, BF16, "cuda", {"needs": HIDDEN}, "frozen", Windows(2048, 128256, BF16)),
    ],
)
def test_a_head_on_cuda_is_planned_as(sizes, dtype, device, options, algorithm, windows):
    chosen = planned(*sizes, dtype, device, **options)
    assert (chosen.algorithm, chosen.windows) == (algorithm, windows)


@pytest.mark.parametrize("sizes", [LLAMA, GEMMA, QWEN, GPT2, (32768, *LLAMA[1:])])
def test_training_holds_half_of_the_logits_and_a_quarter_of_many(sizes):
    n, v, _ = sizes
    share = 4 if n == 32768 else 2
    assert planned(*sizes, BF16, "cuda").predicted_bytes <= n * v * 2 // share


@pytest.mark.parametrize("sizes", [LLAMA, GEMMA, QWEN, GPT2, (32768, *LLAMA[1:]), (4096, 128256, 8192)])
@pytest.mark.parametrize("linear", [True, False])
def test_the_least_memory_on_cuda_is_no_more_than_256_mib(sizes, linear):
    assert planned(*sizes, BF16, "cuda", linear=linear, memory=-1).predicted_bytes <= 256 * MIB


@pytest.mark.parametrize("sizes", [LLAMA, GEMMA, QWEN, GPT2, (32768, *LLAMA[1:])])
def test_a_loss_for_any_upstream_holds_at_most_512_mib(sizes):
    assert planned(*sizes, BF16, "cuda", linear=False).predicted_bytes <= 512 * MIB


def test_a_nearly_full_device_lowers_what_auto_takes():
    free = 512 * MIB
    chosen = planned(*LLAMA, BF16, "cuda", free_bytes=free)
    assert chosen.predicted_bytes <= free // 2 < planned(*LLAMA, BF16, "cuda").predicted_bytes


MEASURED = json.loads((Path(__file__).parents[2] / "benchmarks" / "results" / "head.json").read_text())
TASKS = {"train": {}, "frozen": {"needs": HIDDEN}, "per-token": {"linear": False}}
ROWS = [
    (row["case"], row["task"], row["contender"], row["extra_mib"])
    for row in MEASURED["rows"]
    if row["contender"].startswith("fusedhead") and row["task"] in TASKS and row["data"] == "trained"
    and row["case"].split(":")[0] in MEASURED["runs"][0]["command"]
]  # fmt: skip


@pytest.mark.parametrize(("case", "task", "contender", "mebibytes"), ROWS)
def test_the_predicted_bytes_are_those_measured_on_a_gpu(case, task, contender, mebibytes):
    n, d, v = map(int, case.split(":")[0].split("x"))
    memory = -1 if contender.endswith("min") else 0
    assert planned(n, v, d, BF16, "cuda", memory=memory, **TASKS[task]).predicted_bytes / MIB == pytest.approx(
        mebibytes, rel=0.1
    )


@given(
    tokens=st.integers(1, 1 << 17),
    vocab=st.integers(1, 1 << 18),
    hidden=st.sampled_from((64, 768, 2304)),
    dtype=st.sampled_from((BF16, FP16, FP32)),
    memory=st.sampled_from((0, -1, 64, 400)),
)
def test_blocks_of_equal_size_are_planned_as_they_are_computed(tokens, vocab, hidden, dtype, memory):
    chosen = planned(tokens, vocab, hidden, dtype, "cuda", memory=memory, linear=False)
    assert chosen.windows.tokens == even_size(tokens, chosen.windows.tokens)
    assert chosen.windows.vocab == even_size(vocab, chosen.windows.vocab)
