"""Windows of the Triton engine: slices of a head, and its operands in the form that kernels read."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fusedhead.kernels.contract import Head, RowGrads, even_size
from fusedhead.kernels.gemm import gemm
from fusedhead.kernels.triton_engine.launch.sweep import multiplied_by_cublas

ROW_ALIGNMENT = 64  # windows start at, and rows of a window are padded to, a multiple of this many elements


def even_cuts(total: int, size: int) -> Iterator[slice]:
    """Equal windows of at most ``size`` (`even_size`)."""
    even = even_size(total, size)
    return (slice(at, min(at + even, total)) for at in range(0, total, even))


def full_cuts(total: int, size: int) -> list[slice]:
    """Windows of ``size``, the last one shorter."""
    return [slice(at, min(at + size, total)) for at in range(0, total, max(size, 1))]


def rows_of(x: Tensor, i: slice) -> Tensor:
    """x[i], or x itself if ``i`` covers all rows: a view costs the host about as much time as a launch.

    ``x.shape[0]`` is read instead of ``len(x)``, which is implemented in Python and costs as much again.
    """
    return x if i.start == 0 and i.stop == x.shape[0] else x[i]


def first_rows(x: Tensor, count: int) -> Tensor:
    return rows_of(x, slice(0, count))


def slice_head(head: Head, i: slice, v: slice) -> Head:
    """The head of one window. Its labels still count from the first column of the whole vocabulary."""
    if i.start == v.start == 0 and i.stop == head.h.shape[0] and v.stop == head.w.shape[0]:
        return head
    cols = head.cols[:, v] if head.cols.numel() else head.cols
    rows = head.rows[:, i] if head.rows.numel() else head.rows
    return Head(head.h[i], head.w[v], head.y[i], cols, rows, head.u[v] if head.u.numel() else head.u, head.transform)


def slice_rows(grads: RowGrads, i: slice) -> RowGrads:
    return RowGrads(*[None if g is None else rows_of(g, i) for g in grads])  # a generator would enter a frame for each


def ready_rows(grads: RowGrads) -> RowGrads:
    """Contiguous float32 vectors, as kernels read them."""
    return RowGrads(*[None if g is None else _ready(g) for g in grads])


def _ready(g: Tensor) -> Tensor:
    return g if g.dtype == torch.float32 and g.is_contiguous() else g.to(torch.float32).contiguous()


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.numel() == 0 or (x.stride(-1) == 1 and x.dtype == torch.float32) else x.float().contiguous()


def ready_head(head: Head) -> Head:
    """The head with its vectors in float32 with unit inner stride, as kernels read them; h and w are left as they are.

    Raises ValueError if operands are on different devices, which only the first launch of a kernel would notice.
    """
    device = head.h.device
    for name, x in (("w", head.w), ("labels", head.y), ("cols", head.cols), ("rows", head.rows), ("u", head.u)):
        if x.device != device and x.numel():
            raise ValueError(f"h is on {device} and {name} on {x.device}; all operands must be on one device")
    return head._replace(cols=_unit_stride(head.cols), rows=_unit_stride(head.rows), u=_unit_stride(head.u))


def new_window(head: Head, tokens: int, vocab: int) -> Tensor:
    """An uninitialised window of logits, its rows padded so that they are aligned for TMA and cuBLAS."""
    return head.h.new_empty((tokens, -(-vocab // ROW_ALIGNMENT) * ROW_ALIGNMENT))


def multiplied(head: Head, window: Tensor) -> Tensor | None:
    """The window with h @ w.T, computed by cuBLAS, for a sweep to read and overwrite; None if the sweep multiplies."""
    if not multiplied_by_cublas(head):
        return None
    gemm(head.h, head.w.t(), window[:, : len(head.w)])
    return window
