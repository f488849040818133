"""The entries that float8 leaves out: their list, read from the marks in E8, row after row.

    counts[i] = the number of marked classes of row i other than its label, plus 1 for the label
    classes[ends[i] - counts[i] : ends[i]] = these classes, the label last

in: E8 [M, ld] (`gluon.float8_exponentials`) as bytes, hot [M, tiles] uint8, y [M, K] int64 with K <= 1. out: counts
[M], then classes [capacity], both int32. Bytes: M · tiles of ``hot``, and 192 for each tile of a row that may hold a
mark; no FLOP. One warp works on a row in the order of E8, so that the list is the same in every run. A row whose count
the caller has set to 0 lists nothing.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedhead.kernels.triton_engine.float8.exponentials import FLOAT8_TILE, Tail
from fusedhead.kernels.triton_engine.float8.quantize import class_at
from fusedhead.kernels.triton_engine.launch.launch import Launch
from fusedhead.kernels.triton_engine.launch.sweep import KEPT

MARK = tl.constexpr(0x80)  # the byte of -0
NONE_LEFT = tl.constexpr(2147483647)


@triton.jit(do_not_specialize=("N", "V", "tiles", "sy0"))
def list_kernel(
    E8,  # [., ld] bytes
    hot,  # [N, tiles] uint8
    y,  # [N, K] int64 when LABELS
    ends,  # [N] int32 when FILL: entries of all rows up to this one
    counts,  # [N] int32: out unless FILL
    classes,  # [.] int32: out when FILL
    N,
    V,
    tiles,
    ld,
    sy0,
    LABELS: tl.constexpr,
    FILL: tl.constexpr,
    CHUNK: tl.constexpr,  # bytes of hot that are read at once
    BN: tl.constexpr,
    WIDTH: tl.constexpr,  # BN, rounded up to a power of two
):
    """One program a row."""
    row = tl.program_id(0)
    base = E8 + row.to(tl.int64) * ld
    label = -1
    if LABELS > 0:
        label = tl.load(y + row.to(tl.int64) * sy0).to(tl.int32)
    count = 0
    at = 0
    if FILL:
        count = tl.load(counts + row)
        at = tl.load(ends + row) - count
    if (FILL == 0) | (count > LABELS):  # more than a label
        for first in range(0, tiles, CHUNK):
            tile = first + tl.arange(0, CHUNK)
            bits = tl.load(hot + row.to(tl.int64) * tiles + tile, mask=tile < tiles, other=0)
            left = tl.where(bits != 0, tile, NONE_LEFT)
            nearest = tl.min(left, 0)
            while nearest < NONE_LEFT:
                q = tl.arange(0, WIDTH)
                place = nearest * BN + q
                byte = tl.load(base + place, mask=(q < BN) & (place < ld), other=0)
                found = place // 64 * 64 + class_at(place % 64)
                marked = (byte == MARK) & (found != label)
                marks = marked.to(tl.int32)
                if FILL:
                    tl.store(classes + at + tl.cumsum(marks, 0) - 1, found, mask=marked)
                    at += tl.sum(marks, 0)
                else:
                    count += tl.sum(marks, 0)
                left = tl.where(left == nearest, NONE_LEFT, left)
                nearest = tl.min(left, 0)
    if FILL:
        if (LABELS > 0) & (count > 0):
            tl.store(classes + at, label)
    else:
        tl.store(counts + row, count + LABELS)


CHUNK = 256


@lru_cache(maxsize=KEPT)
def _launch(n: int, vocab: int, tiles: int, ld: int, sy0: int, labels: int, fill: bool) -> Launch:
    bound = {
        "N": n, "V": vocab, "tiles": tiles, "ld": ld, "sy0": sy0, "LABELS": labels, "FILL": fill,
        "CHUNK": CHUNK, "BN": FLOAT8_TILE, "WIDTH": 256, "num_warps": 1,
    }  # fmt: skip
    return Launch(list_kernel, (n, 1, 1), bound)


def count_entries(tail: Tail, y: Tensor, vocab: int) -> Tensor:
    """The number of entries of each row [M] int32, its label included."""
    (n, tiles), (_, labels) = tail.hot.shape, y.shape
    counts = tail.hot.new_empty(n, dtype=torch.int32)
    launch = _launch(n, vocab, tiles, tail.rows.stride(0), y.stride(0), labels, False)
    launch.run(E8=tail.rows.view(torch.uint8), hot=tail.hot, y=y if labels else None, counts=counts)
    return counts


def fill_entries(tail: Tail, y: Tensor, vocab: int, counts: Tensor, ends: Tensor, classes: Tensor) -> None:
    """classes [capacity] int32 <- the entries of row i from ends[i] - counts[i] on, the label last."""
    (n, tiles), (_, labels) = tail.hot.shape, y.shape
    launch = _launch(n, vocab, tiles, tail.rows.stride(0), y.stride(0), labels, True)
    launch.run(
        E8=tail.rows.view(torch.uint8), hot=tail.hot, y=y if labels else None, counts=counts, ends=ends, classes=classes
    )
