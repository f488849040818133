"""Recompute: dz of one window of tokens from the saved lse, one block of the vocabulary after the other.

    dz = dlogits(block)        dw[v] += dzᵀ h        dh += dz w        and sums for the vectors of the transform

Inputs: h [M, D], w [V, D], the row gradients and statistics [M]. Outputs: added to dw [V, D] and dh [M, D]. Never in
memory: more of dz than one block. FLOP: 3 products of 2MDV.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fusedhead.kernels.contract import Head, LogitGrads, RowStats
from fusedhead.kernels.gemm import gemm
from fusedhead.kernels.narrow_sum import NarrowSum
from fusedhead.kernels.triton_engine.launch.sweep import sweep
from fusedhead.kernels.triton_engine.sweeps.dlogits import dlogits
from fusedhead.kernels.triton_engine.weight_gradient import WeightGradient
from fusedhead.kernels.triton_engine.windows import first_rows, multiplied, rows_of, slice_head


def with_low(grads: LogitGrads, rows: RowStats) -> tuple[LogitGrads, RowStats]:
    """Row gradients and statistics for a sweep that takes p = exp(z - lse), without lse_low.

    The missing factor exp(-lse_low) is one number a row, so it scales the row's gradient instead. Only float32 sweeps
    subtract lse_low from every logit. It is up to half a unit in the last place of the lse, and beyond an lse of 2^15
    that is more than the rounding of a dz of two bytes.
    """
    if rows.lse_low is None or grads.constant is grads.linear is grads.quadratic is None:
        return grads, rows
    fade = torch.exp(-rows.lse_low)
    constant, linear, quadratic = (None if g is None else g * fade for g in grads[:3])
    entropy = None if rows.entropy is None else rows.entropy - rows.lse_low  # d = (z - lse) + entropy
    return grads._replace(constant=constant, linear=linear, quadratic=quadratic), rows._replace(entropy=entropy)


def rebuild(
    head: Head,
    i: slice,
    blocks: Iterable[slice],
    buffer: Tensor,
    grads: LogitGrads,
    rows: RowStats,
    dw: WeightGradient | None,
    dh: NarrowSum | None,
    dcols: Tensor | None = None,
    drows: Tensor | None = None,
) -> None:
    """Add the gradients of the tokens ``i`` and the columns in ``blocks``, and finish dh [m, D] of these tokens.

    ``buffer`` has room for a block of dz; ``grads`` and ``rows`` are the row gradients and statistics of the tokens.
    The first window of tokens overwrites its rows of dw; a block that starts at column 0 overwrites dh.
    """
    if head.h.dtype != torch.float32:
        grads, rows = with_low(grads, rows)
    want = frozenset(name for name in ("sum", "linear", "quadratic") if getattr(grads, name) is not None)
    for v in blocks:
        part = slice_head(head, i, v)
        window = first_rows(buffer, len(part.h))
        logits = multiplied(part, window)
        s = sweep("dlogits", part, want, logits=logits)
        vectors = dlogits(s, part, window, grads, rows, v.start, dcols is not None, drows is not None)
        _add_vectors(part, vectors, dcols, drows, i, v)
        window = window[:, : len(part.w)]
        if dw is not None:
            dw.add(window, v, part.h, first=i.start == 0)
        for at, to in () if dh is None else dh.pieces(slice(0, len(part.h))):
            gemm(rows_of(window, at), part.w, to, add=v.start > 0)
    if dh is not None:
        dh.finish()


def _add_vectors(
    head: Head,
    parts: tuple[Tensor | None, Tensor | None],
    dcols: Tensor | None,
    drows: Tensor | None,
    i: slice,
    v: slice,
) -> None:
    part_cols, part_rows = parts
    for j, step in enumerate(head.transform.smooth.steps):
        kind, k = step.kind, step.value
        if dcols is not None and part_cols is not None and kind.vector and kind.axis == "c":
            dcols[int(k), v] += part_cols[j].sum(0)
        if drows is not None and part_rows is not None and kind.vector and kind.axis == "r":
            drows[int(k), i] += part_rows[j].sum(0)
