"""The tile of each kernel: a table in the source, so that nothing is tuned at run time.

The first row that matches capability, dtype, number of tokens and hidden size gives the tile. Tuning inside a step
would synchronise, break the capture of CUDA graphs and make two runs differ. The rows were timed with
``benchmarks/gpu_tiles.py`` on an H100; tiles that `fusedhead.tune` found on this machine come first (`tuned_tiles`).
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton

from fusedhead.kernels import self_check

INTERPRETED = 6  # multiprocessors that the interpreter on a CPU is taken to have


class Tile(NamedTuple):
    """The work of one program at a time: BM tokens by BN vocabulary columns, in steps of BK along the hidden size."""

    BM: int
    BN: int
    BK: int
    group: int  # token blocks that resident programs work on side by side, for reuse in L2 (`device.schedule`)
    warps: int
    stages: int  # depth of the load pipeline
    flatten: bool = True  # loads of the next tile may start during this tile's epilogue
    parts: int = 1  # column parts in which the epilogue handles the tile: 1, 2 or 4; 3 if paired
    resident: int = 1  # programs that run on one multiprocessor at the same time
    paired: bool = False  # two warpgroups of one program take tiles in turn (`gluon.ring`)


class Row(NamedTuple):
    capability: tuple[int, ...]  # major versions; () for any
    kernel: str  # "" for any
    itemsize: int  # bytes of an operand's element; 0 for any
    tokens: int  # applies up to this many tokens; 0 for any
    hidden: int  # applies up to this hidden size; 0 for any
    tile: Tile


# Operands that TMA reads. The kernels over one window share BM: one marks token blocks, another sweeps these again.
TABLE = (
    Row((0,), "", 0, 0, 0, Tile(16, 32, 16, 2, 1, 1, False, 2)),
    Row((9,), "", 2, 64, 0, Tile(64, 256, 64, 1, 4, 3, False, 2)),
    Row((10,), "", 2, 64, 0, Tile(64, 128, 64, 1, 4, 3, False, 1)),
    Row((10,), "", 2, 0, 0, Tile(128, 128, 64, 22, 8, 3, False, 1)),  # 1 part: Triton 3.6 and 3.9 fail on more there
    Row((9,), "exp", 2, 0, 896, Tile(128, 256, 64, 22, 8, 4, True, 4)),
    Row((9,), "exp", 2, 0, 2048, Tile(128, 256, 64, 22, 8, 3, True, 4)),
    Row((9,), "exp", 2, 0, 4096, Tile(128, 256, 64, 11, 8, 3, False, 2)),
    Row((9,), "exp", 2, 0, 0, Tile(128, 256, 64, 22, 8, 3, False, 2)),
    Row((9,), "", 2, 0, 3072, Tile(128, 256, 64, 22, 8, 3, True, 2)),
    Row((9,), "", 2, 0, 0, Tile(128, 256, 64, 11, 8, 3, True, 2)),
    Row((9, 10), "", 4, 0, 0, Tile(128, 128, 32, 12, 8, 3, False, 2)),
)
# Logits without a transform. At larger hidden sizes the tiles above are as fast, since epilogues are rarer there.
PAIRS = (
    Row((9,), "stream", 2, 0, 1536, Tile(128, 192, 64, 22, 4, 4, False, 3, 2, True)),
    Row((9,), "stream", 2, 1024, 0, Tile(128, 256, 64, 11, 8, 3, True, 2)),  # fewer tiles: wider ones fill the chip
    Row((9,), "stream", 2, 0, 0, Tile(128, 192, 64, 22, 4, 4, False, 3, 2, True)),
    Row((9,), "exp", 2, 0, 3072, Tile(128, 192, 64, 22, 4, 4, False, 3, 2, True)),
    Row((9,), "exp8", 2, 0, 0, Tile(128, 192, 64, 22, 4, 4, False, 3, 2, True)),
    Row((9,), "dlogits", 2, 0, 2560, Tile(128, 192, 64, 22, 4, 4, False, 3, 2, True)),
)
PAIRED_FROM = 65  # the least number of tokens for pairs
PAIRED_CHIPS = (9,)  # major capabilities with wgmma, the instruction that pairs use
AMD = 1  # stands for the capability of an AMD chip, which is numbered otherwise and reads through pointers
# Operands that are read through pointers: older chips, or strides that TMA does not take.
POINTERS = (
    Row((0,), "", 0, 0, 0, Tile(16, 32, 16, 2, 1, 1, False, 2)),
    Row((8, 9, 10, 12), "", 2, 0, 0, Tile(128, 128, 32, 12, 8, 3, False, 2)),
    Row((), "", 2, 0, 0, Tile(64, 128, 32, 8, 4, 2, False)),
    Row((), "", 4, 0, 0, Tile(64, 64, 32, 8, 4, 2, False)),
)
# Logits that cuBLAS computed: tiles are read, not multiplied, and four programs a multiprocessor hide the latency.
READY_TILE = Tile(32, 256, 16, 8, 4, 1, False, 1, 4)


def pairs_serve(device: torch.device) -> bool:
    """True if pairs of warpgroups run on this chip and a self-check found them as exact as the plain sweeps."""
    return device.type == "cuda" and device_of(device)[0] in PAIRED_CHIPS and self_check.serves("pairs", device)


def version() -> tuple[int, int]:
    """Triton's version as (major, minor)."""
    major, minor, *_ = triton.__version__.split(".")
    return int(major), int(minor)


@lru_cache(maxsize=64)
def _device(index: int) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(index)
    return AMD if torch.version.hip else properties.major, properties.multi_processor_count


def device_of(device: torch.device) -> tuple[int, int]:
    """(major compute capability, multiprocessors); (0, INTERPRETED) for a CPU, `AMD` in place of AMD's capability."""
    if device.type != "cuda":
        return 0, INTERPRETED
    return _device(torch.cuda.current_device() if device.index is None else device.index)


def tile_for(
    kernel: str, tokens: int, hidden: int, itemsize: int, major: int, tma: bool, ready: bool, pairs: bool = False
) -> Tile:
    """The tile of ``kernel`` ("stream", "exp", "exp8" or "dlogits") for operands [tokens, hidden] of this itemsize.

    ``tma``: TMA reads the operands; ``ready``: cuBLAS computed the logits; ``pairs``: pairs of warpgroups may run.
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
