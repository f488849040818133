"""Statistics: one persistent sweep over z = T(h @ w.T) that accumulates row statistics and stores no logit.

    per row: ref2 = max z·L, total = Σ 2^(z·L - ref2),
             moment, square = Σ 2^(z·L - ref2)(z·L - ref2)^k for k = 1, 2; Σ u z, Σ u (z·L - ref2), Σ u, max and argmax

in: h [N, D], w [V, D] of one floating dtype, y [N, K] int64, the transform's vectors and u float32. out: partial
results part [2 to 7, size] float32 and part_top [2, size] int32 (`device.schedule`), which `rows.merge` folds; picked
[N, K] float32. Never in memory: z, p. FLOP 2NDV. Bytes: w once per group of token blocks, h once per group and step of
the schedule at most, further reads from L2; N · slots · 8 to 36 of partial results. The recurrence is the online
softmax (Milakov and Gimelshein, 2018).

With ONLY the sweep covers only the token blocks that ``flags`` marks, and returns at once if there are none.
"""

# ruff: noqa: SIM102 (a test at compile time stays a statement of its own: `and` would build both sides)
from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedhead.kernels.contract import Head
from fusedhead.kernels.triton_engine.constants import LEAST_KEY, LOG2E, NO_COLUMN
from fusedhead.kernels.triton_engine.device.product import column_part, product
from fusedhead.kernels.triton_engine.device.rows import (
    class_weights,
    finite_or_zero,
    order_key,
    store_labelled,
    weighted_sum,
)
from fusedhead.kernels.triton_engine.device.schedule import any_marked, locate, partial_offset, step_counts
from fusedhead.kernels.triton_engine.device.transform import decided, steps_of, transform
from fusedhead.kernels.triton_engine.device.vectors import Vectors, prefetch_columns
from fusedhead.kernels.triton_engine.launch.launch import Launch
from fusedhead.kernels.triton_engine.launch.sweep import KEPT, Sweep, sweep
from fusedhead.kernels.triton_engine.rows.label_map import labelled_parts, map_labels
from fusedhead.kernels.triton_engine.windows import full_cuts

PART_ROWS = (("variance", 7), ("spread", 6), ("sum", 4), ("entropy", 3))  # rows of ``part`` that a statistic needs
LAUNCH_FLOP = 29 * 10**11  # 4 ms on an H100, against which the start and end of a launch are negligible
UNSPECIALISED = ("N", "V", "D", "K", "GROUP", "size", "sy0", "sy1", "stride_cols", "stride_rows")


@triton.jit(do_not_specialize=UNSPECIALISED)
def stream_kernel(
    h,  # [N, D] descriptor or pointer
    w,  # [V, D] descriptor or pointer
    y,  # [N, K] int64
    label_map,  # [token blocks, tiles] int32 (`label_map`), read when LABELS
    u,  # [V] float32 when HAS_U
    cols,  # [C, V] float32
    rows,  # [R, N] float32
    flags,  # [token blocks] int32, read when ONLY
    picked,  # [N, K] float32, written where a label lies
    part,  # [up to 7, size] float32: ref2, total, moment, sum, relative sum, weight, square
    part_top,  # [2, size] int32: order key of the max, its column
    N,
    V,
    D,
    K,
    GROUP,
    size,
    sh0,
    sh1,
    sw0,
    sw1,
    sy0,
    sy1,
    stride_cols,
    stride_rows,
    STEPS: tl.constexpr,
    LABELS: tl.constexpr,
    HAS_U: tl.constexpr,
    SUM: tl.constexpr,
    SPREAD: tl.constexpr,  # only with SUM
    ENTROPY: tl.constexpr,
    VARIANCE: tl.constexpr,  # only with ENTROPY
    TOP: tl.constexpr,
    ONLY: tl.constexpr,
    EVEN: tl.constexpr,  # V is a multiple of BN
    PRECISE: tl.constexpr,
    TMA: tl.constexpr,
    W_BY_ROWS: tl.constexpr,
    READY: tl.constexpr,
    EVEN_D: tl.constexpr,  # D is a multiple of BK
    PREFETCH: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    FLATTEN: tl.constexpr,
    PARTS: tl.constexpr,  # 1, 2 or 4 column parts, handled one after the other
):
    pid = tl.program_id(0)
    P = tl.num_programs(0)
    vectors = Vectors(cols, stride_cols, V, rows, stride_rows, N)
    main_steps, steps = step_counts(pid, P, N, V, GROUP, BM, BN)
    if ONLY:
        steps = tl.where(any_marked(flags, tl.cdiv(N, BM), tl.arange(0, 128)), steps, 0)

    ref2 = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    moment = tl.zeros((BM,), tl.float32)
    square = tl.zeros((BM,), tl.float32)
    weighted = tl.zeros((BM,), tl.float32)
    relative = tl.zeros((BM,), tl.float32)
    weight = tl.zeros((), tl.float32)
    top = tl.full((BM,), LEAST_KEY, tl.int32)
    where = tl.zeros((BM,), tl.int32)
    for step in tl.range(0, steps, flatten=FLATTEN):
        block, tile, slot, last = locate(step, main_steps, pid, P, N, V, GROUP, BM, BN)
        live = 1
        if ONLY:
            live = tl.load(flags + block)
        row = block * BM + tl.arange(0, BM)
        label_bits = labelled_parts(label_map, block, tile, V, LABELS, BN)
        if live != 0:
            prefetch_columns(vectors, tile * BN + tl.arange(0, BN), STEPS, PREFETCH)
            acc = product(
                h, w, block, tile, N, V, D, sh0, sh1, sw0, sw1, BM, BN, BK, TMA, W_BY_ROWS, READY, EVEN_D
            )
            for j in tl.static_range(PARTS):
                raw = column_part(acc, j, PARTS, BM, BN)
                start = tile * BN + j * (BN // PARTS)
                col = start + tl.arange(0, BN // PARTS)
                if TOP:
                    key = order_key(decided(raw, vectors, col, row, STEPS, PRECISE))
                    key = tl.where((col < V)[None, :], key, LEAST_KEY)
                    best = tl.max(key, 1)
                    at = tl.min(tl.where(key == best[:, None], col[None, :], NO_COLUMN), 1)
                    where = tl.where(best > top, at, where)
                    top = tl.maximum(best, top)
                z = transform(raw, vectors, col, row, STEPS, len(STEPS) // 2, PRECISE)
                if SUM:
                    classes = class_weights(u, col, V, HAS_U, BN // PARTS)
                    weighted += weighted_sum(z, classes, col, V)
                if not EVEN:
                    if start + BN // PARTS > V:
                        z = tl.where((col < V)[None, :], z, float("-inf"))
                new = tl.maximum(ref2, tl.max(z, 1) * LOG2E)
                base = finite_or_zero(new)
                shift = tl.where(tl.abs(ref2) < float("inf"), ref2, base) - base
                fade = tl.exp2(shift)
                exponent = tl.fma(z, LOG2E, -base[:, None])
                e = tl.exp2(exponent)
                if SPREAD:
                    relative += weight * shift + weighted_sum(exponent, classes, col, V)
                    weight += tl.sum(classes, 0)
                if ENTROPY:
                    inside = tl.where((col < V)[None, :], e * exponent, 0.0)
                    if VARIANCE:
                        squares = tl.sum(tl.where((col < V)[None, :], inside * exponent, 0.0), 1)
                        square = fade * (square + shift * (2.0 * moment + shift * total)) + squares
                    moment = fade * (moment + total * shift) + tl.sum(inside, 1)
                total = fade * total + tl.sum(e, 1)
                ref2 = new
                if LABELS > 0:
                    if (label_bits >> j) & 1 != 0:
                        store_labelled(z, y, sy0, sy1, K, row, N, start, picked, LABELS, BN // PARTS)
        if last:
            if live != 0:
                start, _, _ = partial_offset(block, slot, P, N, V, GROUP, BM, BN)
                to = start.to(tl.int64) + tl.arange(0, BM)
                tl.store(part + to, ref2)
                tl.store(part + size + to, total)
                if ENTROPY:
                    tl.store(part + 2 * size + to, moment)
                if VARIANCE:
                    tl.store(part + 6 * size + to, square)
                if SUM:
                    tl.store(part + 3 * size + to, weighted)
                if SPREAD:
                    tl.store(part + 4 * size + to, relative)
                    tl.store(part + 5 * size + to, weight + tl.zeros((BM,), tl.float32))
                if TOP:
                    tl.store(part_top + to, top)
                    tl.store(part_top + size + to, where)
        # selects and not a branch: Triton does not flatten a loop that holds a branch with results
        ref2 = tl.where(last, float("-inf"), ref2)
        total = tl.where(last, 0.0, total)
        moment = tl.where(last, 0.0, moment)
        square = tl.where(last, 0.0, square)
        weighted = tl.where(last, 0.0, weighted)
        relative = tl.where(last, 0.0, relative)
        weight = tl.where(last, 0.0, weight)
        top = tl.where(last, LEAST_KEY, top)
        where = tl.where(last, 0, where)


def launches(head: Head, want: frozenset[str]) -> list[slice]:
    """The tokens of each launch of a sweep over this head: whole groups of token blocks.

    Resident programs are not synchronised. In a long sweep they drift apart, and L2 then holds less of what they read.
    So a launch ends with the group in which it reaches `LAUNCH_FLOP`.
    """
    (n, hidden), vocab = head.h.shape, head.w.shape[0]
    if 2 * n * vocab * hidden <= LAUNCH_FLOP:
        return [slice(0, n)]
    tile = sweep("stream", head, want).tile
    group = tile.group * tile.BM
    return full_cuts(n, group * -(-LAUNCH_FLOP // (2 * group * vocab * hidden)))


@lru_cache(maxsize=KEPT)
def _launch(s: Sweep, want: frozenset[str], labels: int, only: bool) -> Launch:
    if s.tile.paired:
        from fusedhead.kernels.triton_engine.gluon.statistics import stream_pair_kernel  # only where Gluon runs

        return s.launch(stream_pair_kernel, LABELS=labels, ONLY=only)
    top = bool(want & {"max", "argmax"})
    options = {"FLATTEN": False} if only else {}
    return s.launch(
        stream_kernel,
        STEPS=steps_of(s.layout.transform) if top else s.steps,
        LABELS=labels,
        SUM=bool(want & {"sum", "spread"}),
        SPREAD="spread" in want,
        ENTROPY="entropy" in want,
        VARIANCE="variance" in want,
        TOP=top,
        ONLY=only,
        **options,
    )


def stream(
    s: Sweep,
    head: Head,
    want: frozenset[str],
    picked: Tensor | None,
    flags: Tensor | None = None,
    logits: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The partial results ([2 to 7, size] float32, [2, size] int32) of a sweep; ``picked`` [N, K] float32 is filled."""
    h, w, y, cols, rows, u, _ = head
    count = next((rows for name, rows in PART_ROWS if name in want), 2)
    part = h.new_empty((count, s.schedule.size), dtype=torch.float32)
    top = want & {"max", "argmax"}
    part_top = h.new_empty((2, s.schedule.size), dtype=torch.int32) if top else part
    launch = _launch(s, want, 0 if picked is None else s.labels, flags is not None)
    h_tiles, w_tiles = s.operands(h, w, logits)
    launch.run(
        h=h_tiles,
        w=w_tiles,
        y=y,
        label_map=None if picked is None else map_labels(s, y),
        u=u if s.has_u else None,
        cols=cols if s.has_cols else None,
        rows=rows if s.has_rows else None,
        flags=flags,
        picked=picked,
        part=part,
        part_top=part_top,
    )
    return part, part_top
