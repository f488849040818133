"""The windows of a token program: a pure function of sizes and a budget.

| window                                   | holds for each of its logits                          | auto, least    |
|------------------------------------------|-------------------------------------------------------|----------------|
| compiled, on CUDA                        | of each head z and dz; a float32 value               | 2 GiB, 256 MiB |
| compiled, elsewhere (from 2²² logits on) | of each head z, dz and three float32 values          | 128, 32 MiB    |
| other                                    | dz; a float32 result and gradient a call, 12 alive   | 128, 32 MiB    |

On CUDA dw [V, D] is too large for any cache, and a window that is wide enough for fast products leaves room in the
budget: the dz of several windows (`RowPlan.group`) are kept and multiplied at once, so that dw is read and written once
a group.

A compiled window does not depend on the number of tokens, so that another batch finds it compiled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from fusedhead.lowering.plan.problem import AUTO, LEAST_MEMORY, MIB

BUDGET = {"cuda": {AUTO: 2048 * MIB, LEAST_MEMORY: 256 * MIB}}
BUDGET_ELSEWHERE = {AUTO: 128 * MIB, LEAST_MEMORY: 32 * MIB}
MOST_LIVE = 12
MULTIPLE = {"cuda": 128}  # tokens of a window are a multiple of this, for fast matrix products
MULTIPLE_ELSEWHERE = 16
BETWEEN = 4  # bytes of float32 values that a compiled program keeps between its reductions, on CUDA
BETWEEN_ELSEWHERE = 12  # of each head
WINDOW_SHARE = 5 / 8  # of the budget on CUDA, for one window: products of more rows are faster; the rest is for dz
ENOUGH_TOKENS = 384  # of a window, which may take all of the budget: from about there on no sum over a row is split
COMPILE_FROM = 1 << 22  # logits for which compiling pays on a device with cheap launches


def window_bytes(device_type: str, memory: int) -> int:
    """The bytes that a window may hold. ``memory`` is 0 for auto, -1 for the least, else MiB."""
    return memory * MIB if memory > 0 else BUDGET.get(device_type, BUDGET_ELSEWHERE)[memory]


class RowPlan(NamedTuple):
    tokens: int  # of one window
    compiled: bool  # whether whole windows run compiled
    narrow_sums: bool  # whether dw may be summed in its own dtype
    group: int  # windows whose dz are multiplied at once
    predicted_bytes: int  # of a group of windows at the peak


def row_plan(
    shape: tuple[int, int],
    dtype: torch.dtype,
    device_type: str,
    *,
    heads: Sequence[bool],
    calls: int,
    memory: int = AUTO,
) -> RowPlan:
    """The windows of a program with ``calls`` calls; ``shape`` [N, V] of the largest logits. ``heads`` has a flag for
    each head: whether gradients reach it.
    """
    N, V = shape
    budget, on_gpu = window_bytes(device_type, memory), device_type == "cuda"
    compiled = on_gpu or N * V >= COMPILE_FROM
    if on_gpu:
        each = ((len(heads) + sum(heads)) * dtype.itemsize + BETWEEN) * V
        tokens = max(min(budget // each, ENOUGH_TOKENS), int(WINDOW_SHARE * budget) // each)
    elif compiled:
        each = len(heads) * (2 * dtype.itemsize + BETWEEN_ELSEWHERE) * V
        tokens = budget // each
    else:
        each = (2 * max(4, dtype.itemsize) * min(calls, MOST_LIVE) + sum(heads) * dtype.itemsize) * V
        tokens = budget // each
    multiple = MULTIPLE.get(device_type, MULTIPLE_ELSEWHERE) if compiled else 1
    tokens = max(1, tokens // multiple * multiple or tokens)
    windows = max(1, -(-N // tokens))
    group, another = 1, sum(heads) * dtype.itemsize * V * tokens  # bytes of the dz of one more window
    if on_gpu and another:
        most = max(1, 1 + (budget - each * tokens) // another)
        group = -(-windows // -(-windows // most))  # groups of one size
    narrow_sums = dtype not in (torch.bfloat16, torch.float16) or windows <= group  # rounded once
    return RowPlan(tokens, compiled, narrow_sums, group, min(N, tokens) * each + (group - 1) * another)
