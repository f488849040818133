"""The ring: two warpgroups take tiles of z in turn, and the product of one runs during the epilogue of the other.

    acc[128, 192] = h[block·128 :, :] @ w[tile·192 :, :].T        float32, in two accumulators of 128 and 64 columns

in: h [N, D], w [V, D] of two bytes, through TMA descriptors. FLOP 2·128·192·D a tile. A multiprocessor holds one
program with three partitions: one warp loads steps of h and w into a ring of stages, and two warpgroups each multiply
and finish every other tile. A warpgroup keeps its tile in 192 of a thread's 240 registers. So the tensor cores need not
wait for an epilogue, which takes a third of a tile's time at hidden size 768. Each warpgroup counts as a program of
`device.schedule`.

Both warpgroups share one ring, which `loads` fills in the order of their tiles. The phase bit of an mbarrier only
distinguishes consecutive fills, so a warpgroup waits on ``handoff_barriers`` until its peer has seen its last stage
full.

Written in Gluon, for chips with wgmma (capability 9).
"""

# ruff: noqa: RUF059 (Triton needs a name for each part)
from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from fusedhead.kernels.triton_engine.device import rows
from fusedhead.kernels.triton_engine.device.schedule import any_marked, locate, step_counts

async_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # its names before Triton 3.9
async_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global

WIDE = gl.constexpr(128)  # columns of the first accumulator
NARROW = gl.constexpr(64)  # columns of the second accumulator, of a part that is stored, and of one load of w
WORKERS = gl.constexpr((4, 1))  # warps of the second warpgroup and of the loading partition
REGISTERS = gl.constexpr((240, 24))  # registers of a thread of these two; the first warpgroup has the rest

# layouts of the accumulators and of one number a row over the threads of a warpgroup
_WIDE, _NARROW = (gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16]) for columns in (128, 64))
WIDE_TILE, NARROW_TILE = gl.constexpr(_WIDE), gl.constexpr(_NARROW)
PER_ROW, PER_ROW_OF_WIDE = gl.constexpr(gl.SliceLayout(1, _NARROW)), gl.constexpr(gl.SliceLayout(1, _WIDE))


class Sizes(NamedTuple):
    """The sizes that the schedule of a sweep depends on (`device.schedule`)."""

    N: Any
    V: Any
    D: Any
    GROUP: Any
    P: Any  # programs of the schedule: warpgroups


class LabelPointers(NamedTuple):
    y: Any  # [N, K] int64
    sy0: Any
    sy1: Any
    K: Any
    first_col: Any  # the vocabulary's column at which the window starts


class Pipe(NamedTuple):
    """Shared memory of the ring: the operands and barriers of each stage, and the two handoff barriers."""

    a: Any
    wide: Any
    narrow: Any
    full: Any
    free: Any
    handoff_barriers: Any


class Place(NamedTuple):
    """The tile of its sweep that a warpgroup works on."""

    step: Any
    block: Any  # of tokens
    tile: Any  # of the vocabulary
    slot: Any  # of partial results
    last: Any  # true if the warpgroup leaves its token block after the tile
    label_bits: Any  # the tile's entry of the label map
    label_columns: Any  # [BM] int32: the label's column in the tile, -1 outside; only with one label a row


@gluon.jit
def ring(h, w, BM: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr):
    """Allocates the ring: operands of each stage, its barriers "full" and "free", and two handoff barriers."""
    a = gl.allocate_shared_memory(h.dtype, [STAGES, BM, BK], h.layout)
    wide = gl.allocate_shared_memory(w.dtype, [STAGES, WIDE, BK], w.layout)
    narrow = gl.allocate_shared_memory(w.dtype, [STAGES, NARROW, BK], w.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    handoff_barriers = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(free.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(handoff_barriers.index(i), count=1)
    fence_async_shared()
    return Pipe(a, wide, narrow, full, free, handoff_barriers)


@gluon.jit
def _steps(pid, flags, sizes, ONLY: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr):
    """(steps in the full groups of token blocks, steps in all) of warpgroup ``pid``; 0 steps from P on."""
    main_steps, steps = step_counts(pid, sizes.P, sizes.N, sizes.V, sizes.GROUP, BM, BN)
    steps = gl.where(pid < sizes.P, steps, 0)
    if ONLY:
        every_warp: gl.constexpr = gl.BlockedLayout([4], [32], [gl.num_warps()], [0])  # every warp reads all flags
        steps = gl.where(any_marked(flags, gl.cdiv(sizes.N, BM), gl.arange(0, 128, layout=every_warp)), steps, 0)
    return main_steps, steps


@gluon.jit
def _stages(block, flags, sizes, ONLY: gl.constexpr, BK: gl.constexpr):
    """The stages that a tile of this token block fills: ceil(D / BK), or 0 if ONLY and the block is not marked."""
    count = gl.cdiv(sizes.D, BK)
    if ONLY:
        count = gl.where(gl.load(flags + block) != 0, count, 0)
    return count


@gluon.jit
def _next(at, phase, STAGES: gl.constexpr):
    """(the next stage, the phase of its barriers); the phase flips where the ring starts over."""
    at = at + 1
    phase = gl.where(at == STAGES, phase ^ 1, phase)
    return gl.where(at == STAGES, 0, at), phase


@gluon.jit
def loads(
    h, w, flags, pipe, sizes, pid,
    ONLY: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The loading partition: loads the tiles of both warpgroups in turn, each step along D into the next stage."""
    N, V, D, GROUP, P = sizes
    a, wide, narrow, full, free, handoff_barriers = pipe
    main0, steps0 = _steps(pid, flags, sizes, ONLY, BM, BN)
    main1, steps1 = _steps(pid + 1, flags, sizes, ONLY, BM, BN)
    at = 0
    phase = 1  # of the barriers "free": nothing has arrived there yet, and a wait for phase 1 then returns immediately
    for turn in range(2 * gl.maximum(steps0, steps1)):
        step = turn // 2
        second = turn % 2
        if step < gl.where(second == 1, steps1, steps0):
            main = gl.where(second == 1, main1, main0)
            block, tile, slot, last = locate(step, main, pid + second, P, N, V, GROUP, BM, BN)
            col = tile * BN
            for k in range(_stages(block, flags, sizes, ONLY, BK)):
                mbarrier.wait(free.index(at), phase)
                bar = full.index(at)
                mbarrier.expect(bar, (BM + BN) * BK * 2)
                async_load(h, [block * BM, k * BK], bar, a.index(at))
                async_load(w, [col, k * BK], bar, wide.index(at).slice(0, NARROW))
                async_load(w, [col + NARROW, k * BK], bar, wide.index(at).slice(NARROW, NARROW))
                async_load(w, [col + WIDE, k * BK], bar, narrow.index(at))
                at, phase = _next(at, phase, STAGES)


@gluon.jit
def label_columns(labels, k, block, N, start, BM: gl.constexpr, WIDTH: gl.constexpr):
    """The k-th label of each row, counted from ``start``, int32 [BM]; -1 outside [start, start + WIDTH)."""
    row = block * BM + gl.arange(0, BM, layout=PER_ROW)
    return rows.label_position(labels.y, labels.sy0, labels.sy1, k, row, N, labels.first_col + start, WIDTH)


@gluon.jit
def _before(at, STAGES: gl.constexpr):
    """The stage before ``at``, computed since Triton loses a loop variable whose initial value equals another's."""
    return gl.where(at == 0, STAGES - 1, at - 1)


@gluon.jit
def _product(pipe, first, count, done, BM: gl.constexpr, STAGES: gl.constexpr):
    """The two accumulators from ``count`` stages, which are the fills from number ``first`` on; arrives at ``done``."""
    a, wide, narrow, full, free, handoff_barriers = pipe
    acc = gl.zeros((BM, WIDE), gl.float32, layout=WIDE_TILE)
    rest = gl.zeros((BM, NARROW), gl.float32, layout=NARROW_TILE)
    at = first % STAGES
    phase = (first // STAGES) & 1
    for k in range(count):
        mbarrier.wait(full.index(at), phase)
        x = a.index(at)
        acc = warpgroup_mma(x, wide.index(at).permute((1, 0)), acc, use_acc=k > 0, is_async=True)
        rest = warpgroup_mma(x, narrow.index(at).permute((1, 0)), rest, use_acc=k > 0, is_async=True)
        acc, rest = warpgroup_mma_wait(num_outstanding=2, deps=(acc, rest))  # the step before has read its stage
        if k > 0:
            mbarrier.arrive(free.index(_before(at, STAGES)), count=1)
        at, phase = _next(at, phase, STAGES)
    mbarrier.arrive(done, count=1)
    acc, rest = warpgroup_mma_wait(num_outstanding=0, deps=(acc, rest))
    if count > 0:
        mbarrier.arrive(free.index(_before(at, STAGES)), count=1)
    return acc, rest


@gluon.jit
def consumer_warpgroup(
    SECOND: gl.constexpr,  # 0 or 1: which of the two warpgroups
    EPILOGUE: gl.constexpr,  # (acc, rest, state, args, place, sizes, LABELS, EVEN, BM, BN) -> state
    START: gl.constexpr,  # (BM) -> state: a tuple of vectors [BM] in the layout `PER_ROW`
    args,
    labels,
    label_map,
    flags,
    pipe,
    sizes,
    pid,
    ONLY: gl.constexpr,
    LABELS: gl.constexpr,
    EVEN: gl.constexpr,
    BM: gl.constexpr,
    BN: gl.constexpr,
    BK: gl.constexpr,
    STAGES: gl.constexpr,
):
    """A multiplying partition: the product and the epilogue of every other tile of this multiprocessor."""
    N, V, _, GROUP, P = sizes
    handoff_barriers = pipe.handoff_barriers
    own = pid + SECOND
    other = pid + 1 - SECOND
    main_steps, steps = _steps(own, flags, sizes, ONLY, BM, BN)
    other_main, other_steps = _steps(other, flags, sizes, ONLY, BM, BN)
    filled = 0  # fills of the ring before this step's first one
    state = START(BM)
    for step in range(steps):
        block, tile, slot, last = locate(step, main_steps, own, P, N, V, GROUP, BM, BN)
        here = 0
        if LABELS > 0:
            here = gl.load(label_map + block.to(gl.int64) * gl.cdiv(V, BN) + tile)
        at = block
        if LABELS == 1:  # read before the product, because the epilogue has no registers left for addresses
            at = label_columns(labels, 0, block, N, tile * BN, BM, BN)
        count = _stages(block, flags, sizes, ONLY, BK)
        others = 0
        if step < other_steps:
            other_block, other_tile, other_slot, other_last = locate(step, other_main, other, P, N, V, GROUP, BM, BN)
            others = _stages(other_block, flags, sizes, ONLY, BK)
        if SECOND == 1:  # its n-th tile follows the n-th tile of the first warpgroup
            filled += others
            if step < other_steps:
                mbarrier.wait(handoff_barriers.index(1), step & 1)
        elif step <= other_steps:
            mbarrier.wait(handoff_barriers.index(0), (step & 1) ^ 1)
        acc, rest = _product(pipe, filled, count, handoff_barriers.index(1 - SECOND), BM, STAGES)
        filled += count
        if SECOND == 0:
            filled += others
        place = Place(step, block, tile, slot, last, here, at)
        if ONLY:
            if count > 0:
                state = EPILOGUE(acc, rest, state, args, place, sizes, LABELS, EVEN, BM, BN)
        else:
            state = EPILOGUE(acc, rest, state, args, place, sizes, LABELS, EVEN, BM, BN)
    tma.store_wait(0)


@gluon.jit
def pingpong_program(
    EPILOGUE: gl.constexpr, START: gl.constexpr,  # as `consumer_warpgroup` takes them
    args, others,  # arguments of the first warpgroup's epilogue, and of the second's
    h, w, labels, label_map, flags, sizes,
    ONLY: gl.constexpr, LABELS: gl.constexpr, EVEN: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
    BK: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A whole program: two multiplying warpgroups and the partition that loads for them."""
    pipe = ring(h, w, BM, BK, STAGES)
    pid = 2 * gl.program_id(0)
    gl.warp_specialize(
        [
            (consumer_warpgroup, (0, EPILOGUE, START, args, labels, label_map, flags, pipe, sizes, pid,
                     ONLY, LABELS, EVEN, BM, BN, BK, STAGES)),
            (consumer_warpgroup, (1, EPILOGUE, START, others, labels, label_map, flags, pipe, sizes, pid,
                     ONLY, LABELS, EVEN, BM, BN, BK, STAGES)),
            (loads, (h, w, flags, pipe, sizes, pid, ONLY, BM, BN, BK, STAGES)),
        ],
        WORKERS,
        REGISTERS,
    )  # fmt: skip
