"""Tuning: times the persistent kernels with candidate tiles, for a device that the table in `tiles` does not know.

It never runs inside a step, because it synchronises, takes minutes, and may choose another tile the next time.
`fusedhead.tune` calls it for this machine, `benchmarks/gpu_tiles.py` to fill the table.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

import torch

from fusedhead.kernels.contract import Head, LogitGrads, RowStats
from fusedhead.kernels.transform.transform import parse
from fusedhead.kernels.triton_engine.launch.sweep import sweep
from fusedhead.kernels.triton_engine.launch.tiles import Tile
from fusedhead.kernels.triton_engine.rows.label_map import map_labels
from fusedhead.kernels.triton_engine.sweeps.dlogits import dlogits
from fusedhead.kernels.triton_engine.sweeps.exponentials import exponentials
from fusedhead.kernels.triton_engine.sweeps.statistics import stream

GROUPS = (6, 11, 22, 33)
WAYS = {  # (stages, flatten, parts) worth trying with 128x256x64 tiles
    "stream": ((3, True, 2), (3, True, 4), (4, True, 4), (3, False, 1), (4, False, 2)),
    "exp": ((3, True, 4), (3, True, 2), (4, True, 4), (4, False, 4), (3, False, 2)),
    "dlogits": ((3, True, 2), (3, True, 4), (4, True, 4), (4, False, 4)),
}


def tiles_to_time(
    kernel: str, tokens: int, groups: tuple[int, ...], tma: bool = True, paired: bool = True
) -> list[Tile]:
    """The candidate tiles, with those of pairs of warpgroups if ``paired``. Without TMA they are fewer and smaller."""
    if not tma:
        ways = itertools.product(groups, ((128, 32, 3), (128, 32, 4), (128, 64, 3), (64, 64, 4), (256, 32, 3)))
        return [Tile(128, bn, bk, g, 8, stages, False, 2) for g, (bn, bk, stages) in ways]
    if tokens <= 64:
        small = ((256, 64, 3), (256, 64, 4), (128, 128, 4), (128, 64, 6))
        return [Tile(64, bn, bk, 1, 4, s, f, 2) for (bn, bk, s), f in itertools.product(small, (True, False))]
    alone = [Tile(128, 256, 64, g, 8, *way) for g, way in itertools.product(groups, WAYS[kernel])]
    stages = (4, 5) if kernel == "stream" else (4,)  # the others need shared memory for the tiles that they store
    pairs = itertools.product(groups, stages) if paired else ()
    return alone + [Tile(128, 192, 64, g, 4, s, False, 3, 2, True) for g, s in pairs]


def make_head(
    n: int, d: int, v: int, device: str = "cuda", dtype: torch.dtype = torch.bfloat16, transform: str = ""
) -> Head:
    h = torch.randn(n, d, device=device, dtype=dtype)
    w = torch.randn(v, d, device=device, dtype=dtype) / d**0.5
    y = torch.randint(0, v, (n, 1), device=device)
    vectors = torch.randn(1, v, device=device), torch.rand(1, n, device=device)
    return Head(h, w, y, *vectors, torch.empty(0, device=device), parse(transform))


def step_of(kernel: str, head: Head, tile: Tile) -> Callable[[], object]:
    """A function that launches the kernel once with this tile; its buffers are allocated beforehand."""
    n, v = len(head.h), len(head.w)
    s = sweep(kernel, head, tile=tile)
    new = head.h.new_empty
    picked = new((n, 1), dtype=torch.float32)
    if kernel == "stream":
        return lambda: stream(s, head, frozenset({"lse"}), picked)
    window = new((n, -(-v // 64) * 64))
    rows = torch.zeros(n, device=head.h.device)
    labels = map_labels(s, head.y)
    if kernel == "exp":
        part = new((1, s.schedule.size), dtype=torch.float32)
        return lambda: exponentials(s, head, window, rows, picked, picked, part, labels)
    grads = LogitGrads(rows, picked=picked)
    return lambda: dlogits(s, head, window, grads, RowStats(rows), 0, False, False)


def timed(step: Callable[[], object]) -> float:
    """The median time of a step in milliseconds."""
    from triton.testing import do_bench

    return float(do_bench(step, warmup=10, rep=40, return_mode="median"))


def fastest(
    kernel: str,
    head: Head,
    tiles: Iterable[Tile],
    clock: Callable[[Callable[[], object]], float] = timed,
    refused: Callable[[Tile, Exception], object] = lambda tile, problem: None,
) -> list[tuple[float, Tile]]:
    """(milliseconds, tile) of the tiles that run on the device, fastest first; ``refused`` is told of the others."""
    found = []
    for tile in tiles:
        try:
            found.append((clock(step_of(kernel, head, tile)), tile))
        except Exception as problem:  # too much shared memory, too many registers: each raises an error of its own
            refused(tile, problem)
    return sorted(found)
