"""Merge: folds the partial results of a sweep into row statistics.

    ref2 = max ref2_s,  total = Σ_s total_s 2^(ref2_s - ref2),  lse = ref2 / L + ln total
    entropy = ln total - ln 2 · moment / total,  variance = (ln 2)² (square / total - (moment / total)²)
    Σ u (lse - z) = Σ u ln total - Σ u (z·L - ref2) / L,  max and argmax by the largest key, then the smallest column

in: part [2 to 7, size] float32, part_top [2, size] int32, laid out by `device.schedule`. out: vectors [N]. FLOP: a few
per partial result. Bytes: N · slots · 8 read for the lse, up to 36 for everything, and 4 or 8 written per row and
statistic.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedhead.kernels.triton_engine.constants import LEAST_KEY, LN2, NO_COLUMN
from fusedhead.kernels.triton_engine.device.rows import finite_or_zero, from_order_key, log_sum, rounded_off, spread_of
from fusedhead.kernels.triton_engine.device.schedule import partial_offset
from fusedhead.kernels.triton_engine.launch.launch import Launch
from fusedhead.kernels.triton_engine.launch.sweep import KEPT, Sweep


@triton.jit(do_not_specialize=("N", "V", "P", "GROUP", "size"))
def merge_kernel(
    part,  # [up to 7, size] float32: ref2, total, moment, sum, relative sum, weight, square
    part_top,  # [2, size] int32
    flags,  # [token blocks] int32, read when ONLY
    ref2_out,  # [N] float32 base-2 lse + SHIFT, when REF
    lse_out,  # [N] float32, unless REF
    lse_low_out,  # [N] float32, unless REF: the rounding error of lse
    entropy_out,  # [N] float32
    variance_out,  # [N] float32
    sum_out,  # [N] float32
    spread_out,  # [N] float32
    max_out,  # [N] float32
    argmax_out,  # [N] int64
    N,
    V,
    P,
    GROUP,
    size,
    SHIFT: tl.constexpr,
    REF: tl.constexpr,
    FINITE: tl.constexpr,
    ONLY: tl.constexpr,
    SUM: tl.constexpr,
    SPREAD: tl.constexpr,
    ENTROPY: tl.constexpr,
    VARIANCE: tl.constexpr,  # only with ENTROPY
    TOP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """One program per ROWS rows of one token block. ONLY skips the token blocks that ``flags`` does not mark."""
    row0 = tl.program_id(0) * ROWS
    block = row0 // BM
    live = 1
    if ONLY:
        live = tl.load(flags + block)
    if live != 0:
        row = row0 + tl.arange(0, ROWS)
        start, distance, slots = partial_offset(block, 0, P, N, V, GROUP, BM, BN)
        ref2 = tl.full((ROWS,), float("-inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        moment = tl.zeros((ROWS,), tl.float32)
        square = tl.zeros((ROWS,), tl.float32)
        weighted = tl.zeros((ROWS,), tl.float32)
        relative = tl.zeros((ROWS,), tl.float32)
        weight = tl.zeros((ROWS,), tl.float32)
        top = tl.full((ROWS,), LEAST_KEY, tl.int32)
        where = tl.full((ROWS,), NO_COLUMN, tl.int32)
        for first in range(0, slots, SLOTS):
            slot = first + tl.arange(0, SLOTS)
            at = start.to(tl.int64) + slot[:, None].to(tl.int64) * distance + (row - block * BM)[None, :]
            in_range = (slot < slots)[:, None] & (row < N)[None, :]
            ref2_s = tl.load(part + at, mask=in_range, other=float("-inf"))
            total_s = tl.load(part + size + at, mask=in_range, other=0.0)
            new = tl.maximum(ref2, tl.max(ref2_s, 0))
            base = finite_or_zero(new)
            shift = tl.where(tl.abs(ref2) < float("inf"), ref2, base) - base
            shift_s = tl.where(tl.abs(ref2_s) < float("inf"), ref2_s, base[None, :]) - base[None, :]
            fade = tl.exp2(shift)
            fade_s = tl.exp2(shift_s)
            if ENTROPY:
                moment_s = tl.load(part + 2 * size + at, mask=in_range, other=0.0)
                if VARIANCE:
                    square_s = tl.load(part + 6 * size + at, mask=in_range, other=0.0)
                    square_s = tl.sum(fade_s * (square_s + shift_s * (2.0 * moment_s + shift_s * total_s)), 0)
                    square = fade * (square + shift * (2.0 * moment + shift * total)) + square_s
                moment_s = tl.sum(fade_s * (moment_s + total_s * shift_s), 0)
                moment = fade * (moment + total * shift) + moment_s
            if SPREAD:
                weight_s = tl.load(part + 5 * size + at, mask=in_range, other=0.0)
                relative_s = tl.load(part + 4 * size + at, mask=in_range, other=0.0) + weight_s * shift_s
                relative += weight * shift + tl.sum(relative_s, 0)
                weight += tl.sum(weight_s, 0)
            total = fade * total + tl.sum(fade_s * total_s, 0)
            ref2 = new
            if SUM:
                weighted += tl.sum(tl.load(part + 3 * size + at, mask=in_range, other=0.0), 0)
            if TOP:
                key = tl.load(part_top + at, mask=in_range, other=LEAST_KEY)
                col = tl.load(part_top + size + at, mask=in_range, other=NO_COLUMN)
                best = tl.max(key, 0)
                column = tl.min(tl.where(key == best[None, :], col, NO_COLUMN), 0)
                tied = tl.minimum(tl.where(best == top, where, NO_COLUMN), column)
                where = tl.where(best >= top, tied, where)
                top = tl.maximum(best, top)
        if REF:
            reference = ref2 + tl.log2(total) + SHIFT
            if FINITE:  # the total of the row's exponentials shows later that its lse is not finite
                reference = finite_or_zero(reference)
            tl.store(ref2_out + row, reference, mask=row < N)
        else:
            base = finite_or_zero(ref2)
            lse = log_sum(base, total)
            tl.store(lse_out + row, lse, mask=row < N)
            tl.store(lse_low_out + row, rounded_off(base, total, lse), mask=row < N)
        if ENTROPY:
            entropy = (tl.log2(total) - moment / total) * LN2
            tl.store(entropy_out + row, entropy, mask=row < N)
            if VARIANCE:
                mean = moment / total
                tl.store(variance_out + row, (square / total - mean * mean) * (LN2 * LN2), mask=row < N)
        if SUM:
            tl.store(sum_out + row, weighted, mask=row < N)
        if SPREAD:
            tl.store(spread_out + row, spread_of(total, relative, weight), mask=row < N)
        if TOP:
            tl.store(max_out + row, from_order_key(top), mask=row < N)
            tl.store(argmax_out + row, where.to(tl.int64), mask=row < N)


MERGE_ROWS = 16
FLAGS = ("REF", "FINITE", "ONLY", "SUM", "SPREAD", "ENTROPY", "VARIANCE", "TOP")
DEFAULTS: dict[str, Any] = dict.fromkeys(FLAGS, False) | {"SHIFT": 0.0}


@lru_cache(maxsize=KEPT)
def _launch(s: Sweep, chosen: frozenset[tuple[str, Any]]) -> Launch:
    bound = s.arguments(**DEFAULTS, ROWS=MERGE_ROWS) | dict(chosen) | {"num_warps": 1}
    return Launch(merge_kernel, (triton.cdiv(s.n, MERGE_ROWS), 1, 1), bound)


def merge_statistics(s: Sweep, part: Tensor, part_top: Tensor, want: frozenset[str]) -> dict[str, Tensor]:
    """Statistics [N] by name: lse, lse_low, and those of sum, spread, entropy, variance, max, argmax in ``want``."""
    summed = [name for name in ("sum", "spread", "entropy", "variance") if name in want]
    got = {name: part.new_empty(s.n) for name in ("lse", "lse_low", *summed)}
    top = bool(want & {"max", "argmax"})
    if top:
        got |= {"max": part.new_empty(s.n), "argmax": part.new_empty(s.n, dtype=torch.int64)}
    chosen = frozenset(
        {(name.upper(), name in want) for name in ("sum", "spread", "entropy", "variance")} | {("TOP", top)}
    )
    outputs = {f"{name}_out": out for name, out in got.items()}
    _launch(s, chosen).run(part=part, part_top=part_top, **outputs)
    return {name: out for name, out in got.items() if name not in ("max", "argmax") or name in want}


def merge_reference(
    s: Sweep, part: Tensor, ref2: Tensor, shift: float = 0.0, flags: Tensor | None = None, finite: bool = True
) -> None:
    """ref2 [N] <- base-2 lse + shift in the token blocks that ``flags`` marks (None: all); ``finite``: inf, NaN: 0."""
    chosen = frozenset({("REF", True), ("FINITE", finite), ("SHIFT", shift), ("ONLY", flags is not None)})
    _launch(s, chosen).run(part=part, flags=flags, ref2_out=ref2)
