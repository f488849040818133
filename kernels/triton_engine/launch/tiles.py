"""Which tile each kernel uses: a checked-in table, so that nothing is tuned at run time.

A row is chosen by device capability, dtype, number of tokens and hidden size, first match wins. Tuning inside
a step would synchronise, break CUDA graph capture and make two runs differ. Timings behind the rows were
taken with ``benchmarks/gpu_tiles.py`` on an H100; what a machine tuned for itself goes before (`tuned_tiles`).
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton

from fusedhead.kernels import self_check

INTERPRETED = 6  # programs "resident" when Triton's interpreter runs on the CPU


class Tile(NamedTuple):
    """One program's work: BM tokens by BN vocabulary columns, in steps of BK along the hidden size."""

    BM: int
    BN: int
    BK: int
    group: int  # token blocks that the resident programs work on side by side (L2 reuse)
    warps: int
    stages: int  # depth of the load pipeline
    flatten: bool = True  # whether loads of the next tile may start during this tile's epilogue
    parts: int = 1  # the epilogue stores the tile in this many column parts: 1, 2 or 4
    resident: int = 1  # programs that one multiprocessor has registers and shared memory for
    paired: bool = False  # whether these are two groups of warps of one program, in turn (`ring`)


class Row(NamedTuple):
    capability: tuple[int, ...]  # major versions; () for any
    kernel: str  # "" for any
    itemsize: int  # bytes of an operand's element; 0 for any
    tokens: int  # applies up to this many tokens; 0 for any
    hidden: int  # applies up to this hidden size; 0 for any
    tile: Tile


# Operands that TMA can read. The kernels of one sweep share BM: token blocks marked by one are redone by another.
TABLE = (
    Row((0,), "", 0, 0, 0, Tile(16, 32, 16, 2, 1, 1, False, 2)),
    Row((9,), "", 2, 64, 0, Tile(64, 256, 64, 1, 4, 3, False, 2)),
    Row((10,), "", 2, 64, 0, Tile(64, 128, 64, 1, 4, 3, False, 1)),
    Row((10,), "", 2, 0, 0, Tile(128, 128, 64, 22, 8, 3, False, 1)),  # whole: Triton 3.6 and 3.9 fail on parts there
    Row((9,), "exp", 2, 0, 896, Tile(128, 256, 64, 22, 8, 4, True, 4)),
    Row((9,), "exp", 2, 0, 2048, Tile(128, 256, 64, 22, 8, 3, True, 4)),
    Row((9,), "exp", 2, 0, 4096, Tile(128, 256, 64, 11, 8, 3, False, 2)),
    Row((9,), "exp", 2, 0, 0, Tile(128, 256, 64, 22, 8, 3, False, 2)),
    Row((9,), "", 2, 0, 3072, Tile(128, 256, 64, 22, 8, 3, True, 2)),
    Row((9,), "", 2, 0, 0, Tile(128, 256, 64, 11, 8, 3, True, 2)),
    Row((9, 10), "", 4, 0, 0, Tile(128, 128, 32, 12, 8, 3, False, 2)),
)
# The same, of plain logits. With longer rows of w the tiles above store as fast: there are fewer epilogues to hide.
PAIRS = (
    Row((9,), "stream", 2, 0, 1536, Tile(128, 192, 64, 22, 4, 4, False, 3, 2, True)),
    Row((9,), "stream", 2, 1024, 0, Tile(128, 256, 64, 11, 8, 3, True, 2)),  # fewer tiles: wider ones fill the chip
    Row((9,), "stream", 2, 0, 0, Tile(128, 192, 64, 22, 4, 4, False, 3, 2, True)),
    Row((9,), "exp", 2, 0, 3072, Tile(128, 192, 64, 22, 4, 4, False, 3, 2, True)),
    Row((9,), "exp8", 2, 0, 0, Tile(128, 192, 64, 22, 4, 4, False, 3, 2, True)),
    Row((9,), "dlogits", 2, 0, 2560, Tile(128, 192, 64, 22, 4, 4, False, 3, 2, True)),
)
PAIRED_FROM = 65  # tokens
PAIRED_CHIPS = (9,)  # major capabilities with wgmma, which pairs are written in
AMD = 1  # in place of an AMD chip's capability, which counts differently: operands come through pointers
# Operands read through pointers: older chips, strides that TMA does not take
POINTERS = (
    Row((0,), "", 0, 0, 0, Tile(16, 32, 16, 2, 1, 1, False, 2)),
    Row((8, 9, 10, 12), "", 2, 0, 0, Tile(128, 128, 32, 12, 8, 3, False, 2)),
    Row((), "", 2, 0, 0, Tile(64, 128, 32, 8, 4, 2, False)),
    Row((), "", 4, 0, 0, Tile(64, 64, 32, 8, 4, 2, False)),
)
# logits that cuBLAS computed: tiles are read, not multiplied, and enough programs are resident to hide the reads
READY_TILE = Tile(32, 256, 16, 8, 4, 1, False, 1, 4)


def pairs_serve(device: torch.device) -> bool:
    """Whether this chip runs pairs, and this Triton compiles them to what the plain sweeps compute there."""
    return device.type == "cuda" and device_of(device)[0] in PAIRED_CHIPS and self_check.serves("pairs", device)


def version() -> tuple[int, int]:
    """Triton's major and minor number."""
    major, minor, *_ = triton.__version__.split(".")
    return int(major), int(minor)


@lru_cache(maxsize=64)
def _device(index: int) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(index)
    return AMD if torch.version.hip else properties.major, properties.multi_processor_count


def device_of(device: torch.device) -> tuple[int, int]:
    """(major compute capability, multiprocessors); (0, INTERPRETED) for the CPU."""
    if device.type != "cuda":
        return 0, INTERPRETED
    return _device(torch.cuda.current_device() if device.index is None else device.index)


def tile_for(
    kernel: str, tokens: int, hidden: int, itemsize: int, major: int, tma: bool, ready: bool, pairs: bool = False
) -> Tile:
    """The tile of ``kernel`` ("stream", "exp" or "dlogits") for operands [tokens, hidden] of this itemsize.

    ``tma``: whether TMA reads them; ``ready``: whether logits are read instead; ``pairs``: whether pairs take them.
    """
    if ready and major:
        return READY_TILE
    for row in (*(PAIRS if pairs else ()), *(TABLE if tma else ()), *POINTERS):
        if (
            (not row.capability or major in row.capability)
            and row.kernel in ("", kernel)
            and row.itemsize in (0, itemsize)
            and (not row.tokens or tokens <= row.tokens)
            and (not row.hidden or hidden <= row.hidden)
        ):
            return row.tile
    raise AssertionError("the last rows match every device")
