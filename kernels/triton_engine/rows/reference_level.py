"""The reference of each row's exponentials, known before the sweep: the logit of the row's own target.

    ref2[i] = T(h_i · w_{y_i0}) · L        one dot product a row

in: h [N, D], w [V, D] (any strides), y [N, K] int64 (class 0 if K = 0). out: ref2 [N] float32, base 2. Never in memory:
a gathered copy of w. FLOP 2ND; bytes: 2ND elements read. In a trained head the target's logit is within a few tens of
the maximum, so that exp(z - ref) is in the range of bfloat16 and float32. Rows where it is not are swept again
(`unsafe_blocks`).
"""

from __future__ import annotations

from functools import lru_cache

import triton
import triton.language as tl
from torch import Tensor

from fusedhead.kernels.contract import Head
from fusedhead.kernels.triton_engine.constants import LOG2E
from fusedhead.kernels.triton_engine.device.rows import finite_or_zero
from fusedhead.kernels.triton_engine.device.transform import transform
from fusedhead.kernels.triton_engine.device.vectors import Vectors
from fusedhead.kernels.triton_engine.launch.launch import Launch
from fusedhead.kernels.triton_engine.launch.sweep import KEPT, Sweep


@triton.jit(do_not_specialize=("N", "V", "D", "sy0", "stride_cols", "stride_rows"))
def reference_kernel(
    h,
    w,
    y,
    cols,
    rows,
    ref2,
    N,
    V,
    D,
    sh0,
    sh1,
    sw0,
    sw1,
    sy0,
    stride_cols,
    stride_rows,
    STEPS: tl.constexpr,
    LABELS: tl.constexpr,
    PRECISE: tl.constexpr,
    ROWS: tl.constexpr,
    INNER: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    in_range = row < N
    col = tl.zeros((ROWS,), tl.int64)
    if LABELS > 0:
        col = tl.load(y + row.to(tl.int64) * sy0, mask=in_range, other=0)
        col = tl.minimum(tl.maximum(col, 0), V - 1)  # `label_map` reports labels out of range
    inner = tl.arange(0, INNER)
    acc = tl.zeros((ROWS, INNER), tl.float32)
    for k in range(0, D, INNER):
        mask = in_range[:, None] & (k + inner < D)[None, :]
        a = tl.load(h + row.to(tl.int64)[:, None] * sh0 + (k + inner)[None, :] * sh1, mask=mask, other=0.0)
        b = tl.load(w + col[:, None] * sw0 + (k + inner).to(tl.int64)[None, :] * sw1, mask=mask, other=0.0)
        acc += a.to(tl.float32) * b.to(tl.float32)
    vectors = Vectors(cols, stride_cols, V, rows, stride_rows, N)
    z = transform(tl.sum(acc, 1), vectors, col, row, STEPS, len(STEPS) // 2, PRECISE)
    tl.store(ref2 + row, finite_or_zero(z * LOG2E), mask=in_range)  # 0 for a masked target, whose logit is -inf


ROWS_EACH = 4  # rows of one program


@lru_cache(maxsize=KEPT)
def _launch(s: Sweep) -> Launch:
    bound = s.arguments(ROWS=ROWS_EACH, INNER=512, num_warps=4)
    return Launch(reference_kernel, (triton.cdiv(s.n, ROWS_EACH), 1, 1), bound)


def reference(s: Sweep, head: Head, ref2: Tensor) -> None:
    """ref2 [N] <- the logit of each row's first label in base 2; of class 0 if there are no labels."""
    cols, rows = head.cols if s.has_cols else None, head.rows if s.has_rows else None
    _launch(s).run(h=head.h, w=head.w, y=head.y, cols=cols, rows=rows, ref2=ref2)
