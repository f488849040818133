"""The schedule: the order in which resident programs visit the tiles of z, and the layout of their partial results.

P programs stay resident. They take token blocks in groups of ``group``; inside a group the token block varies fastest,
and P is a multiple of ``group``. One program therefore keeps *one* token block for a whole group, while the P programs
together sweep a compact rectangle (``group`` token blocks by P / group vocabulary tiles) whose operands fit in L2.
Because the token block stays, running row statistics stay in registers: a program writes its partial results once per
group and not once per tile, which makes P / group ``slots`` a row. The token blocks left after the full groups are the
tail: its group is smaller, so it has more slots a row.

`Schedule` is the host's view and `locate` the device's; both must agree.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from fusedhead.kernels.triton_engine.launch.tiles import Tile


class Schedule(NamedTuple):
    """How many programs to launch, and how much memory their partial results take."""

    programs: int
    group: int
    blocks: int  # token blocks of BM rows
    size: int  # elements of one partial statistic: slots x rows of the full groups, then of the tail


def schedule(tokens: int, vocab: int, tile: Tile, multiprocessors: int) -> Schedule:
    """The schedule over z [tokens, vocab], both at least 1, for ``multiprocessors`` resident programs."""
    blocks, tiles = -(-tokens // tile.BM), -(-vocab // tile.BN)
    group = min(tile.group, blocks, multiprocessors)
    slots = min(multiprocessors // group, tiles)
    tail = blocks % group
    tail_slots = min(slots * group // max(tail, 1), tiles)
    size = tile.BM * ((blocks - tail) * slots + tail * tail_slots)
    return Schedule(slots * group, group, blocks, size)


@triton.jit
def step_counts(pid, P, N, V, GROUP, BM: tl.constexpr, BN: tl.constexpr):
    """(steps of program ``pid`` in the full groups, its steps in all)."""
    tiles = tl.cdiv(V, BN)
    blocks = tl.cdiv(N, BM)
    tail = blocks % GROUP
    main = (blocks - tail) * tiles
    tail_programs = tl.minimum(P // tl.maximum(tail, 1), tiles) * tail
    # the programs that finish the full groups first take the first tiles of the tail
    q = (pid + P - main % P) % P
    main_steps = tl.cdiv(tl.maximum(main - pid, 0), P)
    tail_steps = tl.cdiv(tl.maximum(tail * tiles - q, 0), tl.maximum(tail_programs, 1))
    return main_steps, main_steps + tl.where(q < tail_programs, tail_steps, 0)


@triton.jit
def locate(step, main_steps, pid, P, N, V, GROUP, BM: tl.constexpr, BN: tl.constexpr):
    """(token block, vocabulary tile, slot, last): ``last`` if the program leaves the token block after this tile."""
    tiles = tl.cdiv(V, BN)
    blocks = tl.cdiv(N, BM)
    tail = blocks % GROUP
    main = (blocks - tail) * tiles
    tail_programs = tl.minimum(P // tl.maximum(tail, 1), tiles) * tail
    q = (pid + P - main % P) % P
    in_main = step < main_steps
    group = tl.where(in_main, GROUP, tl.maximum(tail, 1))
    stride = tl.where(in_main, P, tail_programs)
    tile = tl.where(in_main, pid + step * P, q + (step - main_steps) * tail_programs)
    first = tile // (group * tiles)  # which group; 0 in the tail
    local = tile - first * (group * tiles)
    block = tl.where(in_main, first * GROUP, blocks - tail) + local % group
    slot = tl.where(in_main, pid, q) // group
    return block, local // group, slot, local + stride >= group * tiles


@triton.jit
def partial_offset(block, slot, P, N, V, GROUP, BM: tl.constexpr, BN: tl.constexpr):
    """(offset of the partial result of the first row of ``block`` at ``slot``, distance between slots, slots a row)."""
    tiles = tl.cdiv(V, BN)
    blocks = tl.cdiv(N, BM)
    tail = blocks % GROUP
    main_rows = (blocks - tail) * BM
    slots = P // GROUP
    in_main = block < blocks - tail
    rows = tl.where(in_main, main_rows, tail * BM)
    base = tl.where(in_main, block * BM, slots * main_rows + (block - (blocks - tail)) * BM)
    count = tl.where(in_main, slots, tl.minimum(P // tl.maximum(tail, 1), tiles))
    return base + slot * rows, rows, count


@triton.jit
def any_marked(flags, blocks, lane):
    """True if one of flags[:blocks] (int32, 0 or 1) is set. ``lane`` is arange(0, 128) in the caller's layout."""
    count = lane * 0
    for first in range(0, blocks, 128):
        index = first + lane
        count += tl.load(flags + index, mask=index < blocks, other=0)
    return tl.sum(count, 0) > 0
