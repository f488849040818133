"""The entries that float8 leaves out: their list, read from the marks in E8, four bytes at once.

    counts[i] = the number of marked classes of row i other than its label, plus 1 for the label
    classes[ends[i] - counts[i] : ends[i]] = these classes, the label last

in: E8 [M, ld] (`gluon.float8_exponentials`) as words of four bytes, hot [M, tiles] uint8, y [M, K] int64 with K <= 1.
out: counts [M], then classes [capacity], both int32. Only the byte of a mark has its highest bit set. Bytes: M · tiles
of ``hot``, and 192 for each tile of a row that may hold a mark; no FLOP. The order is that of E8, so that the list is
the same in every run. A row whose count the caller has set to 0 lists nothing.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedhead.kernels.triton_engine.float8.exponentials import FLOAT8_BLOCK, FLOAT8_TILE, Tail
from fusedhead.kernels.triton_engine.float8.quantize import class_at, place_of
from fusedhead.kernels.triton_engine.launch.launch import Launch
from fusedhead.kernels.triton_engine.launch.sweep import KEPT

MARKS = tl.constexpr(-2139062144)  # 0x80808080: the highest bits of four bytes


@triton.jit
def _bits(marks):
    """The number of marks in words of which only these four bits may be set."""
    ones = (marks >> 7) & 0x01010101
    return (ones + (ones >> 8) + (ones >> 16) + (ones >> 24)) & 7


@triton.jit(do_not_specialize=("N", "tiles", "sy0"))
def list_kernel(
    E8,  # [., ld / 4] int32
    hot,  # [N, tiles] uint8
    y,  # [N, K] int64 when LABELS
    flags,  # [token blocks] int32 when ONLY
    ends,  # [N] int32 when FILL: entries of all rows up to this one
    counts,  # [N] int32: out unless FILL
    classes,  # [.] int32: out when FILL
    N,
    tiles,
    ld,
    sy0,
    LABELS: tl.constexpr,
    FILL: tl.constexpr,
    ONLY: tl.constexpr,
    BM: tl.constexpr,  # tokens of a flag
    TILES: tl.constexpr,  # tiles that are read at once
    WORDS: tl.constexpr,  # of a tile
    WIDTH: tl.constexpr,  # WORDS, rounded up to a power of two
):
    """One program a row; ONLY skips the token blocks that ``flags`` does not mark."""
    row = tl.program_id(0)
    live = 1
    if ONLY:
        live = tl.load(flags + row // BM)
    base = E8 + row.to(tl.int64) * (ld // 4)
    label = -1
    label_word = -1
    label_bit = 0
    if LABELS > 0:
        label = tl.load(y + row.to(tl.int64) * sy0).to(tl.int32)
        label_place = label // 64 * 64 + place_of(label % 64)
        label_word = label_place // 4
        label_bit = label_place % 4
    count = 0
    at = 0
    if FILL:
        count = tl.load(counts + row)
        at = tl.load(ends + row) - count
        live = (count > LABELS).to(tl.int32)  # more than a label
    if live != 0:
        q = tl.arange(0, WIDTH)
        for first in range(0, tiles, TILES):
            tile = first + tl.arange(0, TILES)
            bits = tl.load(hot + row.to(tl.int64) * tiles + tile, mask=tile < tiles, other=0).to(tl.int32)
            if tl.max(bits, 0) != 0:
                word = tile[:, None] * WORDS + q[None, :]
                there = (bits != 0)[:, None] & (q < WORDS)[None, :] & (word * 4 < ld)
                marks = tl.load(base + word, mask=there, other=0) & MARKS
                marks = tl.where(word == label_word, marks & ~(128 << (8 * label_bit)), marks)
                each = _bits(marks)
                found = tl.sum(tl.sum(each, 1), 0)
                if FILL:
                    if found != 0:
                        flat = tl.reshape(each, (TILES * WIDTH,))
                        before = tl.reshape(tl.cumsum(flat, 0) - flat, (TILES, WIDTH)) + at
                        for b in tl.static_range(4):
                            marked = ((marks >> (8 * b + 7)) & 1) != 0
                            place = word * 4 + b
                            tl.store(classes + before, place // 64 * 64 + class_at(place % 64), mask=marked)
                            before += marked.to(tl.int32)
                        at += found
                else:
                    count += found
        if FILL == 0:
            tl.store(counts + row, count + LABELS)
    if FILL:  # noqa: SIM102 (a test at compile time)
        if (LABELS > 0) & (count > 0):
            tl.store(classes + at, label)


@lru_cache(maxsize=KEPT)
def _launch(
    device: torch.device, n: int, tiles: int, ld: int, sy0: int, labels: int, fill: bool, only: bool, block: int
) -> Launch:
    bound = {
        "N": n, "tiles": tiles, "ld": ld, "sy0": sy0, "LABELS": labels, "FILL": fill, "ONLY": only, "BM": block,
        "TILES": 16 if fill else 32, "WORDS": FLOAT8_TILE // 4, "WIDTH": 64, "num_warps": 2,
    }  # fmt: skip
    return Launch(list_kernel, (n, 1, 1), bound)


def count_entries(
    tail: Tail, y: Tensor, counts: Tensor, flags: Tensor | None = None, block: int = FLOAT8_BLOCK
) -> None:
    """counts [M] int32 <- the entries of each row, its label included; with ``flags`` in marked blocks only."""
    (n, tiles), (_, labels) = tail.hot.shape, y.shape
    ld, only = tail.rows.stride(0), flags is not None
    launch = _launch(y.device, n, tiles, ld, y.stride(0), labels, False, only, block)
    launch.run(E8=tail.rows.view(torch.int32), hot=tail.hot, y=y if labels else None, flags=flags, counts=counts)


def fill_entries(tail: Tail, y: Tensor, counts: Tensor, ends: Tensor, classes: Tensor) -> None:
    """classes [capacity] int32 <- the entries of row i from ends[i] - counts[i] on, the label last."""
    (n, tiles), (_, labels) = tail.hot.shape, y.shape
    launch = _launch(y.device, n, tiles, tail.rows.stride(0), y.stride(0), labels, True, False, FLOAT8_BLOCK)
    launch.run(
        E8=tail.rows.view(torch.int32), hot=tail.hot, y=y if labels else None, counts=counts, ends=ends, classes=classes
    )
