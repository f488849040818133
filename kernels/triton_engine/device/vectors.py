"""The vectors of a head's `Transform` inside a kernel: loads of a tile's entries, and prefetches of them.

A column vector that is first read in the epilogue makes all warps wait for memory, once per column part. A prefetch
before the product avoids that wait for one instruction a thread and no register.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Vectors(NamedTuple):
    """The column vectors (along V) and row vectors (along N) that the steps of a chain refer to by index."""

    cols: Any  # [C, V] float32
    stride_cols: Any
    V: Any
    rows: Any  # [R, N] float32
    stride_rows: Any
    N: Any


@triton.jit
def along_columns(z, vectors, index: tl.constexpr, col):
    """cols[index][col], broadcast against z; zero past the vocabulary."""
    values = tl.load(vectors.cols + index * vectors.stride_cols.to(tl.int64) + col, mask=col < vectors.V, other=0.0)
    if len(z.shape) == 2:  # loaded as a vector: a two-dimensional load would impose its layout on the whole tile
        values = values[None, :]
    return values


@triton.jit
def along_rows(z, vectors, index: tl.constexpr, row):
    """rows[index][row], broadcast against z; zero past the last token."""
    values = tl.load(vectors.rows + index * vectors.stride_rows.to(tl.int64) + row, mask=row < vectors.N, other=0.0)
    if len(z.shape) == 2:
        values = values[:, None]
    return values


@triton.jit
def prefetch(at, PREFETCH: tl.constexpr):
    """Prefetch the cache lines of the addresses ``at``; nothing without PREFETCH."""
    if PREFETCH:
        tl.inline_asm_elementwise(
            "{ prefetch.global.L1 [$1]; mov.u32 $0, 0; }", "=r,l", [at], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def _prefetch(vectors, col, STEPS: tl.constexpr, J: tl.constexpr):
    op: tl.constexpr = STEPS[2 * J]
    if op == "addcol" or op == "mulcol" or op == "setcol" or op == "dropcol":
        prefetch(
            vectors.cols + STEPS[2 * J + 1] * vectors.stride_cols.to(tl.int64) + tl.minimum(col, vectors.V - 1), True
        )


@triton.jit
def prefetch_columns(vectors, col, STEPS: tl.constexpr, PREFETCH: tl.constexpr):
    """Prefetch the entries at ``col`` [BN] of every column vector of the chain; nothing without PREFETCH."""
    if PREFETCH:
        for j in tl.static_range(len(STEPS) // 2):
            _prefetch(vectors, col, STEPS, j)
