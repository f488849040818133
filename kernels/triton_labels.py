"""Where the labels are: checks their range, and tells a sweep which parts of its tiles hold one.

    map[b, t] = bits: bit j set when a label of token block b lies in column part j of vocabulary tile t

in: y [N, K] int64. out: map [token blocks, tiles] int32. Bytes: 8NK a tile chunk read, 4 · blocks · tiles written.
Most tiles of a large vocabulary hold no label, and a sweep learns it from one scalar instead of a comparison per
logit or a reduction per tile. A label outside [0, vocabulary) fails a device assertion, as in eager code.
This file must not know what a label is used for.
"""

from __future__ import annotations

import triton
import triton.language as tl


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
