"""The plans of the Triton engine as a table: windows that fill waves of tiles, within half of the logits' bytes."""

from __future__ import annotations

import pytest

from fusedhead.kernels.contract import Windows
from fusedhead.lowering.plan.problem import MIB
from tests.lowering.problems import (
    BF16,
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
        (LLAMA, BF16, "cuda", {"memory": -1, "linear": False}, "recompute", Windows(8192, 12032, BF16)),
        (LLAMA, BF16, "cuda", {"linear": False}, "recompute", Windows(8192, 16384, BF16)),
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
