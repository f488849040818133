"""Where the labels are: checks their range, and tells a sweep which parts of its tiles hold one.

    map[b, t] = bits: bit j set when a label of token block b lies in column part j of vocabulary tile t

in: y [N, K] int64. out: map [token blocks, tiles] int32. Bytes: 8NK a tile chunk read, 4 · blocks · tiles written.
Most tiles of a large vocabulary hold no label, and a sweep learns it from one scalar instead of a comparison per
logit or a reduction per tile. A label outside [0, vocabulary) fails a device assertion, as in eager code.
This file must not know what a label is used for.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedhead.kernels.triton_sweep import Sweep


@triton.jit(do_not_specialize=("N", "V", "K", "sy0", "sy1"), debug=True)
def check_labels_kernel(y, N, V, K, sy0, sy1, ROWS: tl.constexpr):
    """Asserts 0 <= y < V for every label. One program per ROWS tokens, a loop over labels."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    for k in range(K):
        label = tl.load(y + row * sy0 + k * sy1, mask=row < N, other=0)
        tl.device_assert((label >= 0) & (label < V), "a label is out of range: it must lie in [0, vocabulary)")


@triton.jit(do_not_specialize=("N", "tiles", "K", "first_col", "sy0", "sy1"))
def map_labels_kernel(
    y,  # [N, K] int64
    label_map,  # [token blocks, tiles] int32
    N,
    tiles,
    K,
    first_col,  # vocabulary column of the window's first
    sy0,
    sy1,
    BM: tl.constexpr,
    WIDTH: tl.constexpr,  # columns of a part
    PARTS: tl.constexpr,
    TILES: tl.constexpr,  # tiles that one program maps
):
    """Program (b, c): token block b, TILES tiles from c · TILES on."""
    block = tl.program_id(0)
    row = block.to(tl.int64) * BM + tl.arange(0, BM)
    tile = tl.program_id(1) * TILES + tl.arange(0, TILES)
    bits = tl.zeros((TILES,), tl.int32)
    for k in range(K):
        label = tl.load(y + row * sy0 + k * sy1, mask=row < N, other=-1)
        part = tl.where(label >= first_col, (label - first_col) // WIDTH, -1).to(tl.int32)
        for j in tl.static_range(PARTS):
            there = (tile * PARTS + j)[None, :] == part[:, None]
            bits |= tl.max(there.to(tl.int32), 0) << j
    tl.store(label_map + block.to(tl.int64) * tiles + tile, bits, mask=tile < tiles)


def check_labels(y: Tensor, vocab: int) -> None:
    """Device assertion that every label names a column."""
    if y.numel():
        rows = 256
        check_labels_kernel[(triton.cdiv(len(y), rows),)](
            y, len(y), vocab, y.shape[1], y.stride(0), y.stride(1), ROWS=rows
        )


def map_labels(s: Sweep, first_col: int = 0) -> Tensor:
    """[token blocks, tiles] int32: which parts of which tiles hold a label, counted from ``first_col``."""
    y, tiles = s.head.y, triton.cdiv(len(s.head.w), s.tile.BN)
    label_map = y.new_empty((s.schedule.blocks, tiles), dtype=torch.int32)
    map_labels_kernel[(s.schedule.blocks, triton.cdiv(tiles, 64))](
        y,
        label_map,
        len(y),
        tiles,
        y.shape[1],
        first_col,
        y.stride(0),
        y.stride(1),
        BM=s.tile.BM,
        WIDTH=s.tile.BN // s.tile.parts,
        PARTS=s.tile.parts,
        TILES=64,
    )
    return label_map
