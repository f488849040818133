"""What the Triton engine may be asked to do for one head, the fastest first, and how many bytes each way holds.

| algorithm   | held besides operands and results                                                          |
|-------------|--------------------------------------------------------------------------------------------|
| statistics  | partial rows, in float32 a window of logits [tokens, V] too                                |
| single pass | a window of exponentials [tokens, V], E w of its rows in float32, float32 sums of dw        |
| frozen      | the same without dw                                                                        |
| recompute   | a block of dz [tokens, vocab], half of dh of its rows in float32, float32 sums of dw        |

Where one pass would do but has no room, recompute keeps the exponentials of its first block, so the wider a block is
the less is computed twice: windows are then as low as sums of dw allow.

Rules behind the order, measured on an H100 (benchmarks/NOTES.md): windows are equal and of whole token blocks, or all
but the last up to a fifth taller, where E w then fills whole waves of cuBLAS's tiles (1 % of a step at D = 4096, 4 % at
2560); dw is added up in its own dtype over up to `EXACT_SUMS` windows (each addition rounds: at 4 windows the error of
dw was that of eager code, at 8 1.35 times it), in float32 over more, half of which lies in dw's own memory; a window of
less than `AUTO_TOKENS` rows costs speed. It must not know which way is chosen (`fusedhead.lowering.plan`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from fusedhead.kernels.contract import Needs, Windows

MIB = 1 << 20
WAVE = 132 * 256 * 128  # numbers that cuBLAS's tiles on all multiprocessors of an H100 compute at once
TALLER = 1.2  # of a window, to fill its last wave
BLOCK = 128  # tokens and columns that windows are cut to
TILE = 256  # columns of a kernel's tile: a block of whole tiles leaves no program half a tile
EXACT_SUMS = 3
MOST_TOKENS = 8192  # of a window
SUMMED_TOKENS = (1536, 4096)  # of a window where dw is summed in float32: fewer lose to recompute, more gain nothing
AUTO_TOKENS = 2048  # auto goes no lower to save memory
FEWEST_TOKENS = 512  # fewer make a single pass slower than to recompute
FROZEN_BYTES, FROZEN_TOKENS = 576 * MIB, 1024
BLOCK_BYTES = 256 * MIB  # of dz: fewer blocks are fewer launches
RECOMPUTE_BYTES = 480 * MIB  # that auto gives to dz and float32 dh
LEAST_BYTES = 256 * MIB  # what "min" may hold


class Sizes(NamedTuple):
    n: int
    v: int
    d: int
    dtype: torch.dtype
    needs: Needs


class Way(NamedTuple):
    algorithm: str
    windows: Windows
    held: int  # bytes at the peak


def _narrow(head: Sizes) -> bool:
    return head.dtype in (torch.bfloat16, torch.float16)


def _way(head: Sizes, algorithm: str, tokens: int, vocab: int) -> Way:
    """The windows, and bytes at the peak."""
    n, v, d, dtype, needs = head
    tokens, vocab = max(1, min(tokens, n)), max(1, min(vocab, v))
    several = -(-n // tokens) > EXACT_SUMS
    wide_sums = several and _narrow(head) and needs.w
    windows = Windows(tokens, vocab, torch.float32 if wide_sums else dtype)
    partial = 192 if _narrow(head) else 640  # bytes of a row in partial sums: 6 to 33 slots, and of its statistics
    held = MIB + n * partial * (1 if any(needs) else 2)
    if any(needs) or not _narrow(head):
        held += tokens * -(-vocab // 64) * 64 * dtype.itemsize
        wide_dh = 2 if algorithm == "recompute" and vocab < v else 4 * (algorithm != "recompute")
        held += wide_dh * tokens * d * (needs.h and _narrow(head))
        held += 2 * v * d * wide_sums
    return Way(algorithm, windows, held)


def _equal_windows(n: int, most: int, fewest: int, hidden: int = 0) -> Iterator[int]:
    """Rows of equal windows of whole token blocks, from the largest that is allowed.

    Each is preceded by a taller one whose product E w [rows, hidden] fills whole waves of cuBLAS's tiles, if there is.
    """
    wave = WAVE // hidden // BLOCK * BLOCK if hidden else 0
    count = 1
    while True:
        tokens = min(n, -(-n // (BLOCK * count)) * BLOCK)
        if tokens <= most:
            waves = -(-tokens // wave) * wave if wave else 0
            if tokens < waves <= min(n, most, TALLER * tokens):
                yield waves
            yield max(1, tokens)
        if tokens <= max(fewest, BLOCK):
            return
        count += max(1, count // 8)


def _single_passes(head: Sizes) -> list[Way]:
    ways = [_way(head, "single pass", at, head.v) for at in _equal_windows(head.n, MOST_TOKENS, FEWEST_TOKENS, head.d)]
    least, most = SUMMED_TOKENS
    return [way for way in ways if way.windows.accumulate == head.dtype or least <= way.windows.tokens <= most]


def _recomputes(head: Sizes, most: int, keep: bool) -> list[Way]:
    """Blocks of dz that fill ``most`` bytes, tall ones first (dw is not added up then) unless a block is kept."""
    few = -(-head.n // EXACT_SUMS)
    few = -(-few // BLOCK) * BLOCK
    heights = [max(few, AUTO_TOKENS if keep else MOST_TOKENS)]
    while heights[-1] > 16:
        heights.append(max(16, heights[-1] // 2))
    ways = []
    for tokens in (min(at, max(head.n, 1)) for at in heights):
        held = _way(head, "recompute", tokens, 1).held - 64 * tokens * head.dtype.itemsize
        room = min(max(most - held, 0), BLOCK_BYTES) if most else BLOCK_BYTES
        columns = room // (max(tokens, 1) * head.dtype.itemsize) // TILE * TILE
        ways += [_way(head, "recompute", tokens, at) for at in (columns, BLOCK) if at]
    return ways


def _auto_bytes(head: Sizes) -> int:
    """What auto may hold in a single pass: half of the logits, a quarter where they are many."""
    return head.n * head.v * head.dtype.itemsize // (4 if head.n >= 32768 else 2)


def _first(ways: list[Way], most: int, tokens: int) -> list[Way]:
    """The first way that holds no more than ``most`` bytes or has no more than ``tokens`` rows, and what follows."""
    for at, way in enumerate(ways):
        if way.held <= most or way.windows.tokens <= tokens:
            return ways[at:]
    return ways[-1:]


def ways(head: Sizes, *, one_pass: bool, budget: int) -> list[Way]:
    """Ways to compute this head, the preferred first. ``budget`` bytes, 0 for what suits the device.

    ``one_pass``: whether gradients are a row scale away from exponentials, known before the sweep.
    """
    needs = head.needs
    if not any(needs):
        if _narrow(head):
            return [_way(head, "statistics", head.n, head.v)]
        found = [_way(head, "statistics", at, head.v) for at in _equal_windows(head.n, MOST_TOKENS, 16)]
        return found if budget else _first(found, BLOCK_BYTES, 16)
    frozen = not (needs.w or needs.cols)
    keep = one_pass and head.dtype == torch.bfloat16
    recompute = _recomputes(head, budget or RECOMPUTE_BYTES, keep)
    if one_pass and frozen:
        found = [_way(head, "frozen", at, head.v) for at in _equal_windows(head.n, SUMMED_TOKENS[1], 16, head.d)]
        return [*(found if budget else _first(found, FROZEN_BYTES, FROZEN_TOKENS)), *recompute]
    if one_pass:
        found = _single_passes(head)
        return [*(found if budget else _first(found, _auto_bytes(head), AUTO_TOKENS)), *recompute]
    return recompute
