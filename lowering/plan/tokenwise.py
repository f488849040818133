"""The windows of a token program: a pure function of sizes and a budget.

| window                                   | holds for each of its logits                         | auto, least    |
|------------------------------------------|------------------------------------------------------|----------------|
| compiled, on CUDA                        | of each head z, dz and a float32 value               | 2 GiB, 256 MiB |
| compiled, elsewhere (from 2²² logits on) | of each head z, dz and three float32 values          | 128, 32 MiB    |
| other                                    | a float32 result and gradient of each call, 12 alive | 128, 32 MiB    |

A compiled window does not depend on the number of tokens, so that another batch finds it compiled.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from fusedhead.lowering.plan.problem import AUTO, LEAST_MEMORY, MIB

BUDGET = {"cuda": {AUTO: 2048 * MIB, LEAST_MEMORY: 256 * MIB}}
BUDGET_ELSEWHERE = {AUTO: 128 * MIB, LEAST_MEMORY: 32 * MIB}
EXACT_TOKEN_SUMS = 3  # up to this many windows, dw summed in a narrow dtype errs no more than in eager code
MOST_LIVE = 12
MULTIPLE = {"cuda": 64}  # tokens of a window are a multiple of this, for fast matrix products
MULTIPLE_ELSEWHERE = 16
BETWEEN = {"cuda": 4}  # bytes of float32 values that a compiled program keeps between its reductions
BETWEEN_ELSEWHERE = 12
COMPILE_FROM = 1 << 22  # logits for which compiling pays on a device with cheap launches


def window_bytes(device_type: str, memory: int) -> int:
    """The bytes that a window may hold. ``memory`` is 0 for auto, -1 for the least, else MiB."""
    return memory * MIB if memory > 0 else BUDGET.get(device_type, BUDGET_ELSEWHERE)[memory]


class RowPlan(NamedTuple):
    tokens: int  # of one window
    compiled: bool  # whether whole windows run compiled
    narrow_sums: bool  # whether dw may be summed in its own dtype
    predicted_bytes: int  # of a window at the peak


def row_plan(
    shape: tuple[int, int], dtype: torch.dtype, device_type: str, *, heads: int, calls: int, memory: int = AUTO
) -> RowPlan:
    """The windows of a program with ``calls`` calls on ``heads`` heads; ``shape`` [N, V] of the largest logits."""
    N, V = shape
    budget = window_bytes(device_type, memory)
    compiled = device_type == "cuda" or N * V >= COMPILE_FROM
    if compiled:
        multiple = MULTIPLE.get(device_type, MULTIPLE_ELSEWHERE)
        between = BETWEEN.get(device_type, BETWEEN_ELSEWHERE)
        each = heads * (2 * dtype.itemsize + between) * V
        tokens = budget // each
        tokens = max(1, tokens // multiple * multiple or tokens)
    else:
        each = 2 * max(4, dtype.itemsize) * min(calls, MOST_LIVE) * V
        tokens = max(1, budget // each)
    narrow_sums = dtype not in (torch.bfloat16, torch.float16) or -(-N // tokens) <= EXACT_TOKEN_SUMS
    return RowPlan(tokens, compiled, narrow_sums, min(N, tokens) * each)
