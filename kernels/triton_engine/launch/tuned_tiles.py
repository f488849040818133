"""Tuned tiles: the tiles that `python -m fusedhead.tune` timed on this machine, in a JSON file.

They take precedence over the table in the source (`tiles`). One file serves all devices and versions of Triton. If it
is missing or damaged the table decides. A process reads it once.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fusedhead.kernels.triton_engine.launch.tiles import PAIRED_FROM, Tile, version
from fusedhead.kernels.user_cache import cache_file, read_json, write_json

log = logging.getLogger("fusedhead")
KERNELS = ("stream", "exp", "dlogits")
REMEDY = "delete it or run `python -m fusedhead.tune` again"
TILE_ROWS = 128  # BM of every tile in the file: one kernel marks token blocks, and another sweeps these again


class Tuned(NamedTuple):
    """One tile and the largest hidden size that it is for. Among the tiles for one size the fastest comes first."""

    kernel: str
    itemsize: int  # bytes of an operand's element
    tma: bool
    hidden: int
    tile: Tile


def tiles_file() -> Path:
    """The path of the file: $FUSEDHEAD_TILES, else fusedhead/tiles.json in the user's cache folder."""
    return cache_file("tiles.json", "FUSEDHEAD_TILES")


def device_key(device: torch.device) -> str:
    """The key of a device's tiles in the file: the device's name and Triton's version."""
    return f"{torch.cuda.get_device_name(device)}, Triton {'.'.join(map(str, version()))}"


def _row(kernel: str, itemsize: int, tma: bool, hidden: int, tile: list[Any]) -> Tuned:
    return Tuned(kernel, itemsize, tma, hidden, Tile(*tile))


def _read(path: Path) -> dict[str, list[Any]]:
    try:
        return {name: [_row(*row) for row in rows] for name, rows in read_json(path, REMEDY).items()}
    except (ValueError, TypeError) as problem:
        log.warning("%s cannot be used (%s); %s", path, problem, REMEDY)
        return {}


@lru_cache(maxsize=16)
def known(path: Path, name: str) -> tuple[Tuned, ...]:
    """The tiles of one device, fastest first."""
    return tuple(row for row in _read(path).get(name, ()) if row.tile.BM == TILE_ROWS and row.kernel in KERNELS)


def keep_tiles(name: str, rows: list[Tuned]) -> Path:
    """Replace the tiles of the device ``name`` in the file; returns the file's path."""
    path = tiles_file()
    write_json(path, _read(path) | {name: rows})
    known.cache_clear()
    return path


def tuned_tile(
    kernel: str, device: torch.device, tokens: int, hidden: int, itemsize: int, tma: bool, pairs: bool
) -> Tile | None:
    """The tuned tile of this kernel, or None; ``pairs``: pairs of warpgroups may run, so their tiles count too."""
    if device.type != "cuda" or tokens < PAIRED_FROM:
        return None
    fit = [
        row
        for row in known(tiles_file(), device_key(device))
        if (row.kernel, row.itemsize, row.tma) == (kernel, itemsize, tma) and (pairs or not row.tile.paired)
    ]
    sizes = sorted({row.hidden for row in fit})
    if not sizes:
        return None
    size = next((size for size in sizes if size >= hidden), sizes[-1])
    return next(row.tile for row in fit if row.hidden == size)
