"""Unsafe blocks: the token blocks whose exponentials left the safe range and are swept again with a better reference.

    flags[b] = 1 if the total Σ_v E[i, v] of a row i of block b is not between two bounds (0, inf, NaN are not)

The bounds are 1e-18 and 1e18 for exponentials that are stored in the range of float32, others for float16. There a
total is known where the exponentials themselves are not, and gives the reference of the next sweep:

    ref2[i] <- ref2[i] + log2 total_i - SHIFT in the marked blocks; lost[b] = 1 if a total of block b is 0, inf or NaN

in: the sweep's partial totals [size] float32, laid out by `device.schedule`. out: flags [token blocks] int32, which
later kernels read on the device, so that the host need not wait. Bytes: N · slots · 4; FLOP: one addition per partial
total.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedhead.kernels.triton_engine.constants import SAFE_TOTAL
from fusedhead.kernels.triton_engine.device.schedule import partial_offset
from fusedhead.kernels.triton_engine.launch.launch import Launch
from fusedhead.kernels.triton_engine.launch.sweep import KEPT, Sweep


@triton.jit(do_not_specialize=("N", "V", "P", "GROUP"))
def check_kernel(
    part,  # [1 or 3, size] float32, the totals first
    flags,  # [token blocks] int32
    lost,  # [token blocks] int32 when REBASE
    ref2,  # [N] float32 when REBASE
    N,
    V,
    P,
    GROUP,
    BM: tl.constexpr,
    BN: tl.constexpr,
    SLOTS: tl.constexpr,
    LEAST: tl.constexpr,
    MOST: tl.constexpr,
    REBASE: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """One program a token block."""
    block = tl.program_id(0)
    start, distance, slots = partial_offset(block, 0, P, N, V, GROUP, BM, BN)
    lane = tl.arange(0, BM)
    total = tl.zeros((BM,), tl.float32)
    for first in range(0, slots, SLOTS):
        slot = first + tl.arange(0, SLOTS)
        at = start.to(tl.int64) + slot[:, None].to(tl.int64) * distance + lane[None, :]
        total += tl.sum(tl.load(part + at, mask=(slot < slots)[:, None], other=0.0), 0)
    safe = (total > LEAST) & (total < MOST)
    bad = (block * BM + lane < N) & (safe == 0)
    marked = tl.max(bad.to(tl.int32), 0)
    tl.store(flags + block, marked)
    if REBASE:
        row = block * BM + lane
        known = (total > 0.0) & (total < float("inf"))
        if marked != 0:
            change = (row < N) & known
            tl.store(ref2 + row, tl.load(ref2 + row, mask=change, other=0.0) + tl.log2(total) - SHIFT, mask=change)
        tl.store(lost + block, tl.max((bad & (known == 0)).to(tl.int32), 0))


@lru_cache(maxsize=KEPT)
def _launch(s: Sweep, least: float, most: float, shift: float | None) -> Launch:
    rebase = {"REBASE": shift is not None, "SHIFT": shift or 0.0}
    return Launch(check_kernel, (s.schedule.blocks, 1, 1), s.arguments(LEAST=least, MOST=most, **rebase, num_warps=4))


def mark_unsafe(s: Sweep, part: Tensor) -> Tensor:
    """flags [token blocks] int32: 1 if the total of a row shows that its exponentials left the safe range."""
    flags = part.new_empty(s.schedule.blocks, dtype=torch.int32)
    _launch(s, 1 / SAFE_TOTAL.value, SAFE_TOTAL.value, None).run(part=part, flags=flags, lost=None, ref2=None)
    return flags


def rebase_unsafe(
    s: Sweep, part: Tensor, ref2: Tensor, bounds: tuple[float, float], shift: float
) -> tuple[Tensor, Tensor]:
    """(flags, lost) [token blocks] int32, and ref2 [N] <- base-2 lse - shift in marked blocks that are not lost."""
    flags = part.new_empty(s.schedule.blocks, dtype=torch.int32)
    lost = torch.empty_like(flags)
    _launch(s, *bounds, shift).run(part=part, flags=flags, lost=lost, ref2=ref2)
    return flags, lost
