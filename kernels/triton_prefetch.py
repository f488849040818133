"""Brings the column vectors that a tile's epilogue will read into the cache while the tile is multiplied.

A vector that is first touched in the epilogue makes all warps wait for memory, once for each column part. Asking for
its lines before the product costs one instruction a thread and no register. It must not know what vectors mean.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _prefetch(vectors, col, STEPS: tl.constexpr, J: tl.constexpr):
    op: tl.constexpr = STEPS[2 * J]
    if op == "addcol" or op == "mulcol" or op == "setcol":
        at = vectors[0] + STEPS[2 * J + 1] * vectors[1].to(tl.int64) + tl.minimum(col, vectors[2] - 1)
        tl.inline_asm_elementwise(
            "{ prefetch.global.L1 [$1]; mov.u32 $0, 0; }", "=r,l", [at], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def prefetch_columns(vectors, col, STEPS: tl.constexpr, PREFETCH: tl.constexpr):
    """Ask for the entries at ``col`` [BN] of every column vector that the chain names; nothing unless PREFETCH."""
    if PREFETCH:
        for j in tl.static_range(len(STEPS) // 2):
            _prefetch(vectors, col, STEPS, j)
