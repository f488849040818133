"""The plans of the torch engine as a table: windows of exponentials that fit caches and budgets."""

from __future__ import annotations

import pytest

from fusedhead.kernels.contract import Windows
from tests.lowering.problems import (
    BF16,
    FP16,
    FP32,
    HIDDEN,
    NOTHING,
    SQUARE,
    WIDENED,
    planned,
)


@pytest.mark.parametrize(
    ("sizes", "dtype", "device", "options", "algorithm", "windows"),
    [
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
def test_a_head_on_a_cpu_is_planned_as(sizes, dtype, device, options, algorithm, windows, kernel_threads):
    chosen = planned(*sizes, dtype, device, **options)
    if chosen.windows.threads:
        assert (dtype, device, kernel_threads) == (FP32, "cpu", chosen.windows.threads)
        return
    assert (chosen.algorithm, chosen.windows) == (algorithm, windows)
