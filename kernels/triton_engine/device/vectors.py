"""The vectors of a head's Transform inside a kernel: loading the entries of a tile, and prefetching them.

A column vector that is first touched in the epilogue makes all warps wait for memory, once for each column part: asking
for its lines before the product costs one instruction a thread and no register.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Vectors(NamedTuple):
    """The vectors along the vocabulary and along the tokens that a chain's steps name by index."""

    cols: Any  # [C, V] float32
    stride_cols: Any
    V: Any
    rows: Any  # [R, N] float32
    stride_rows: Any
    N: Any


@triton.jit
def along_columns(z, vectors, index: tl.constexpr, col):
    """cols[index][col] to go with z, zero past the vocabulary."""
    values = tl.load(vectors.cols + index * vectors.stride_cols.to(tl.int64) + col, mask=col < vectors.V, other=0.0)
    if len(z.shape) == 2:  # loaded flat: a two-dimensional load would drag the whole tile into its layout
        values = values[None, :]
    return values


@triton.jit
def along_rows(z, vectors, index: tl.constexpr, row):
    """rows[index][row] to go with z, zero past the last token."""
    values = tl.load(vectors.rows + index * vectors.stride_rows.to(tl.int64) + row, mask=row < vectors.N, other=0.0)
    if len(z.shape) == 2:
        values = values[:, None]
    return values


@triton.jit
def prefetch(at, PREFETCH: tl.constexpr):
    """Ask for the lines that hold the addresses ``at``; nothing unless PREFETCH."""
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
    """Ask for the entries at ``col`` [BN] of every column vector that the chain names; nothing unless PREFETCH."""
    if PREFETCH:
        for j in tl.static_range(len(STEPS) // 2):
            _prefetch(vectors, col, STEPS, j)
