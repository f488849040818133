"""`Sweep`: tile, schedule and shared kernel arguments of one persistent kernel over one window of a head.

A `Sweep` holds no addresses. Equal windows share one cached `Sweep` and its bound launches (`launch.launch`), so that
the host cost of a step is about that of the launches. The function that launches a kernel stands below the kernel in
its file. No launch synchronises, tunes or depends on values, so that CUDA graphs can capture all of them.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from fusedhead.kernels.contract import Head
from fusedhead.kernels.transform.transform import Transform
from fusedhead.kernels.triton_engine.device.product import readable_by_tma, reads_rows
from fusedhead.kernels.triton_engine.device.schedule import Schedule, schedule
from fusedhead.kernels.triton_engine.device.transform import steps_of
from fusedhead.kernels.triton_engine.launch.descriptors import Tiles
from fusedhead.kernels.triton_engine.launch.launch import Launch, Placed
from fusedhead.kernels.triton_engine.launch.tiles import AMD, PAIRED_FROM, Tile, device_of, pairs_serve, tile_for
from fusedhead.kernels.triton_engine.launch.tuned_tiles import tuned_tile

TRITON_DTYPE = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
SLOTS = 16  # partial results of a row that a kernel reads at once
KEPT = 512  # size of the caches of sweeps and of launches
PLAIN = frozenset({"lse", "picked"})  # the statistics that pairs of warpgroups (`gluon`) compute
PAIRED_REGISTERS = 168  # average per thread of a paired program: 12 warps share the multiprocessor's 65,536


class WindowLayout(NamedTuple):
    """The facts about one window of a head on which compilation and schedule depend."""

    device: torch.device
    dtype: torch.dtype
    h: tuple[int, ...]  # [N, D]
    h_strides: tuple[int, ...]
    w: tuple[int, ...]  # [V, D]
    w_strides: tuple[int, ...]
    y: tuple[int, ...]  # [N, K]
    y_strides: tuple[int, ...]
    col_strides: tuple[int, ...]
    row_strides: tuple[int, ...]
    has_u: bool
    transform: Transform
    tma: bool
    logits_strides: tuple[int, ...]  # of logits that cuBLAS computed; () if the sweep multiplies


def _suited(tile: Tile, kernel: str, transform: Transform, want: frozenset[str]) -> Tile:
    """The tile with an epilogue that fits into registers: 4 column parts and 3 stages where it holds more values.

    A statistics sweep whose transform only adds or masks columns gets a tile in one part that is not flattened: reading
    a column vector costs it 5 % of its time, and 25 % if loads of the next tile overlap the epilogue.
    """
    if kernel == "dlogits" or tile.BN < 256:
        more = transform.steps or (kernel == "exp" and want)
        return tile._replace(parts=4) if more and kernel != "stream" else tile
    if kernel == "stream" and "variance" in want:  # one more value a row: registers spill in a tile of 256 columns
        return tile._replace(BN=128, parts=2, stages=min(tile.stages, 3))
    if transform.varies_along_row or (kernel == "stream" and not want <= PLAIN):
        return tile._replace(parts=4, stages=min(tile.stages, 3))
    if kernel == "stream" and any(op in ("addcol", "dropcol") for op, _ in transform.steps):
        return tile._replace(flatten=False, parts=1)
    return tile


class Sweep:
    """One persistent kernel over one window. Compared by identity: equal layouts give the same cached object."""

    def __init__(self, kernel: str, layout: WindowLayout, want: frozenset[str], tile: Tile | None) -> None:
        (n, hidden), (vocab, _) = layout.h, layout.w
        smooth, self.ready = layout.transform.smooth, bool(layout.logits_strides)
        major, multiprocessors = device_of(layout.device)
        self.prefetches = major > AMD  # prefetches are PTX, which AMD and the interpreter do not run
        if tile is None:
            pairs = (
                n >= PAIRED_FROM
                and layout.tma
                and not smooth.steps
                and want <= PLAIN
                and reads_rows(layout.w_strides)
                and pairs_serve(layout.device)
            )
            size = layout.dtype.itemsize
            if not self.ready:
                tile = tuned_tile(kernel, layout.device, n, hidden, size, layout.tma, pairs)
            tile = tile or tile_for(kernel, n, hidden, size, major, layout.tma, self.ready, pairs)
            if tile.BN >= 128 and tile.parts > 1 and not self.ready:
                tile = _suited(tile, kernel, smooth, want)
        self.n, self.vocab, self.hidden, self.k = n, vocab, hidden, layout.y[1]
        self.labels = min(self.k, 2)
        self.layout, self.transform, self.steps = layout, smooth, steps_of(smooth)
        axes = {axis for step in smooth.steps for axis, _ in step.vectors}
        self.has_u, self.has_cols, self.has_rows = layout.has_u, "c" in axes, "r" in axes  # which vectors kernels read
        self.tile = tile
        self.schedule: Schedule = schedule(n, vocab, tile, multiprocessors * tile.resident)
        self.by_rows = not layout.tma or reads_rows(layout.w_strides)
        self.h_tiles: Tiles | None = None
        self.w_tiles: Tiles | None = None
        self.window_tiles: dict[int, Tiles] = {}  # by the row stride of the window

    def beside(self, kernel: str) -> Sweep:
        """The sweep of another kernel over the same window, with that kernel's tile."""
        return _sweep(kernel, self.layout, frozenset(), None)

    def launch(self, kernel: Any, **own: Any) -> Launch:
        """A launch of a persistent kernel. Logits that cuBLAS computed take the place of h."""
        place = dict(zip(("sh0", "sh1"), self.layout.logits_strides))
        programs = self.schedule.programs
        if self.tile.paired:
            programs = -(-programs // 2)
            own |= {"STAGES": self.tile.stages, "maxnreg": PAIRED_REGISTERS}
        return Launch(kernel, (programs, 1, 1), self.arguments(**place, **own))

    def arguments(self, **own: Any) -> dict[str, Any]:
        """The arguments that all kernels of a sweep share, and ``own`` ones of a kernel."""
        layout, tile = self.layout, self.tile
        return {
            "N": self.n,
            "V": self.vocab,
            "D": self.hidden,
            "K": self.k,
            "GROUP": self.schedule.group,
            "P": self.schedule.programs,
            "size": self.schedule.size,
            "sh0": layout.h_strides[0],
            "sh1": layout.h_strides[1],
            "sw0": layout.w_strides[0],
            "sw1": layout.w_strides[1],
            "sy0": layout.y_strides[0],
            "sy1": layout.y_strides[1],
            "stride_cols": layout.col_strides[0] if len(layout.col_strides) == 2 else 0,
            "stride_rows": layout.row_strides[0] if len(layout.row_strides) == 2 else 0,
            "STEPS": self.steps,
            "LABELS": self.labels,
            "HAS_U": layout.has_u,
            "EVEN": self.vocab % tile.BN == 0,
            "PRECISE": layout.dtype == torch.float32,
            "DTYPE": TRITON_DTYPE[layout.dtype],
            "TMA": layout.tma,
            "W_BY_ROWS": self.by_rows,
            "READY": self.ready,
            "EVEN_D": self.hidden % tile.BK == 0,
            "PREFETCH": self.prefetches,
            "BM": tile.BM,
            "BN": tile.BN,
            "BK": tile.BK,
            "FLATTEN": tile.flatten,
            "PARTS": tile.parts,
            "SLOTS": SLOTS,
            "num_warps": tile.warps,
            "num_stages": tile.stages,
        } | own

    def operands(self, h: Tensor, w: Tensor, window: Tensor | None) -> tuple[Any, Any]:
        """h and w as `device.product` reads them: through TMA descriptors, through pointers, or as computed logits."""
        if self.ready:
            return window, window
        if not self.layout.tma:
            return h, w
        if self.h_tiles is None or self.w_tiles is None:
            tile, view = self.tile, w if self.by_rows else w.t()
            block = [tile.BN, tile.BK] if self.by_rows else [tile.BK, tile.BN]
            if tile.paired:
                block = [tile.BN // tile.parts, tile.BK]
            self.h_tiles = Tiles(h, h.shape, h.stride(), [tile.BM, tile.BK], tile.paired)
            self.w_tiles = Tiles(view, view.shape, view.stride(), block, tile.paired)
        return Placed(self.h_tiles, h), Placed(self.w_tiles, w)

    def window(self, window: Tensor) -> Placed:
        """The window [n, ld] as a kernel stores it: through a descriptor that clips tiles at column V."""
        distance = window.stride(0)
        tiles = self.window_tiles.get(distance)
        if tiles is None:
            tile = self.tile
            block = [tile.BM, tile.BN // tile.parts]
            tiles = Tiles(window, (self.n, self.vocab), (distance, 1), block, tile.paired)
            self.window_tiles[distance] = tiles
        return Placed(tiles, window)


_sweep = lru_cache(maxsize=KEPT)(Sweep)


def forget() -> None:
    """Forget all sweeps, so that tiles are chosen again: a verdict of a self-check or a tuned tile has changed."""
    _sweep.cache_clear()


def multiplied_by_cublas(head: Head) -> bool:
    """True if cuBLAS computes the logits into the window before a sweep reads them: float32.

    Without tensor cores, Triton's float32 product takes 5 times as long as cuBLAS's. With TF32 it truncates operands
    where cuBLAS rounds them: all logits shrink, and a loss errs by 4e-4 of itself where eager's errs by 2e-6.
    """
    return head.h.dtype == torch.float32 and device_of(head.h.device)[0] > 0


def sweep(
    kernel: str,
    head: Head,
    want: frozenset[str] = frozenset(),
    tile: Tile | None = None,
    logits: Tensor | None = None,
) -> Sweep:
    """The sweep of ``kernel`` ("stream", "exp", "exp8" or "dlogits") over z [N, V] of a (sliced) head; N, V >= 1.

    ``tile`` overrides the table's; ``logits`` [N, ld] holds h @ w.T if cuBLAS computed it.
    """
    h, w, y, cols, rows, u, transform = head
    major, _ = device_of(h.device)
    layout = WindowLayout(
        h.device,
        h.dtype,
        h.shape,
        h.stride(),
        w.shape,
        w.stride(),
        y.shape,
        y.stride(),
        cols.stride(),
        rows.stride(),
        u.numel() > 0,
        transform,
        logits is None and readable_by_tma(h, w, major),
        () if logits is None else logits.stride(),
    )
    return _sweep(kernel, layout, want, tile)
