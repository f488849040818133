"""In which windows a row program runs: a pure function of sizes and a budget.

| device | what a window holds for each of its logits                                     | auto, min      |
|--------|--------------------------------------------------------------------------------|----------------|
| CUDA   | compiled: of each head z, dz and one float32 value between two reductions      | 2 GiB, 256 MiB |
| other  | a float32 result and its gradient for each call that is alive, 12 at most      | 64, 32 MiB     |

A window on CUDA does not depend on the number of tokens, so that another batch finds it compiled. It must not know
what a program computes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from fusedhead.lowering.plan import AUTO, LEAST, MIB

BUDGET = {"cuda": {AUTO: 2048 * MIB, LEAST: 256 * MIB}}
BUDGET_ELSEWHERE = {AUTO: 64 * MIB, LEAST: 32 * MIB}
EXACT_SUMS = {"cuda": 4}  # up to this many windows, sums of dw in a narrow dtype err no more than eager code does
EXACT_SUMS_ELSEWHERE = 8
MOST_LIVE = 12
MULTIPLE = 64  # of tokens, in a window that matrix products are to like


def window_bytes(device_type: str, memory: int) -> int:
    """What a window may hold. ``memory`` is 0 for auto, -1 for the least, else MiB."""
    return memory * MIB if memory > 0 else BUDGET.get(device_type, BUDGET_ELSEWHERE)[memory]


class RowPlan(NamedTuple):
    tokens: int  # of one window
    narrow_sums: bool  # whether dw may be summed in its own dtype


def row_plan(
    N: int, V: int, dtype: torch.dtype, device_type: str, *, heads: int, calls: int, memory: int = AUTO
) -> RowPlan:
    """The windows of a program of so many ``calls`` on ``heads`` heads; V is the largest vocabulary."""
    budget = window_bytes(device_type, memory)
    if device_type == "cuda":
        tokens = budget // (heads * (2 * dtype.itemsize + 4) * V)
        tokens = max(1, tokens // MULTIPLE * MULTIPLE or tokens)
    else:
        tokens = max(1, budget // (2 * max(4, dtype.itemsize) * min(calls, MOST_LIVE) * V))
    exact = EXACT_SUMS.get(device_type, EXACT_SUMS_ELSEWHERE)
    return RowPlan(tokens, dtype not in (torch.bfloat16, torch.float16) or -(-N // tokens) <= exact)
