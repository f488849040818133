"""The label map: which column parts of which tiles hold a label. It also checks the range of labels.

    map[b, t]: bit j is set if a label of token block b lies in column part j of vocabulary tile t

in: y [N, K] int64. out: map [token blocks, tiles] int32. Bytes: 8NK read per 64 tiles, 4 · blocks · tiles written; no
FLOP. Most tiles of a large vocabulary hold no label. From the map a sweep learns this by one scalar load, without a
comparison per logit or a reduction per tile. A label outside [0, vocabulary) fails a device assertion, as in eager
code.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedhead.kernels.triton_engine.launch.launch import Launch
from fusedhead.kernels.triton_engine.launch.sweep import KEPT, Sweep


@triton.jit
def _assert_a_column(label, there, V):
    tl.device_assert(
        ((label >= 0) & (label < V)) | (there == 0), "a label is out of range: it must lie in [0, vocabulary)"
    )


@triton.jit(do_not_specialize=("N", "V", "K", "sy0", "sy1"), debug=True)
def check_labels_kernel(y, N, V, K, sy0, sy1, ROWS: tl.constexpr):
    """Asserts 0 <= y < V for all labels y [N, K] int64. One program per ROWS tokens; 8NK bytes read."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    for k in range(K):
        label = tl.load(y + row * sy0 + k * sy1, mask=row < N, other=-1)
        _assert_a_column(label, row < N, V)


@triton.jit(do_not_specialize=("N", "V", "tiles", "K", "first_col", "sy0", "sy1"), debug=True)
def map_labels_kernel(
    y,  # [N, K] int64
    label_map,  # [token blocks, tiles] int32
    first_col,  # the vocabulary's column at which the window starts
    N,
    V,
    tiles,
    K,
    sy0,
    sy1,
    BM: tl.constexpr,
    WIDTH: tl.constexpr,  # columns of a part
    PARTS: tl.constexpr,
    TILES: tl.constexpr,  # tiles that one program maps
    CHECK: tl.constexpr,
):
    """Program (b, c) maps token block b and TILES tiles from c · TILES on. CHECK also asserts 0 <= y < V."""
    block = tl.program_id(0)
    row = block.to(tl.int64) * BM + tl.arange(0, BM)
    tile = tl.program_id(1) * TILES + tl.arange(0, TILES)
    bits = tl.zeros((TILES,), tl.int32)
    for k in range(K):
        label = tl.load(y + row * sy0 + k * sy1, mask=row < N, other=-1)
        if CHECK:
            _assert_a_column(label, row < N, V)
        part = tl.where(label >= first_col, (label - first_col) // WIDTH, -1).to(tl.int32)
        for j in tl.static_range(PARTS):
            in_part = (tile * PARTS + j)[None, :] == part[:, None]
            bits |= tl.max(in_part.to(tl.int32), 0) << j
    tl.store(label_map + block.to(tl.int64) * tiles + tile, bits, mask=tile < tiles)


@triton.jit
def labelled_parts(label_map, block, tile, V, LABELS: tl.constexpr, BN: tl.constexpr):
    """The bits of one tile: which of its column parts hold a label. 0 if the sweep reads no labels."""
    bits = 0
    if LABELS > 0:
        bits = tl.load(label_map + block.to(tl.int64) * tl.cdiv(V, BN) + tile)
    return bits


@lru_cache(maxsize=KEPT)
def _check_launch(device: torch.device, shape: tuple[int, int], strides: tuple[int, int], vocab: int) -> Launch:
    rows, (n, k) = 256, shape
    bound = {"N": n, "V": vocab, "K": k, "sy0": strides[0], "sy1": strides[1], "ROWS": rows}
    return Launch(check_labels_kernel, (triton.cdiv(n, rows), 1, 1), bound)


def check_labels(y: Tensor, vocab: int) -> None:
    """Assert on the device that every label is a column of the vocabulary."""
    if y.numel():
        _check_launch(y.device, y.shape, y.stride(), vocab).run(y=y)  # type: ignore[arg-type]


@lru_cache(maxsize=KEPT)
def _map_launch(s: Sweep, check: bool) -> Launch:
    tile, tiles, chunk = s.tile, triton.cdiv(s.vocab, s.tile.BN), 64
    bound = s.arguments(tiles=tiles, WIDTH=tile.BN // tile.parts, TILES=chunk, CHECK=check, num_warps=4)
    return Launch(map_labels_kernel, (s.schedule.blocks, triton.cdiv(tiles, chunk), 1), bound)


def map_labels(s: Sweep, y: Tensor, first_col: int = 0, check: bool = False) -> Tensor:
    """The label map [token blocks, tiles] int32 of a window that starts at column ``first_col``.

    ``check``: also assert what `check_labels` does, for a window that holds the whole vocabulary.
    """
    label_map = y.new_empty((s.schedule.blocks, -(-s.vocab // s.tile.BN)), dtype=torch.int32)  # `cdiv` costs more
    _map_launch(s, check).run(y=y, label_map=label_map, first_col=first_col)
    return label_map
