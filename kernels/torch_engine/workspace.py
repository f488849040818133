"""The workspace model of the torch engine: the bytes that it holds besides operands and results, for the planner.

It is an upper bound with one term for each kind of buffer. A test compares it with real allocations.
"""

from __future__ import annotations

import torch

from fusedhead.kernels.contract import Needs, stat_dtype
from fusedhead.kernels.torch_engine.blocks import (
    GATHER_BYTES,
    SAMPLED_COLUMNS,
    block_columns,
    piece_rows,
    row_dtype,
    strip_columns,
    widened_columns,
)
from fusedhead.kernels.torch_engine.product_dtypes import kept_dtype
from fusedhead.kernels.transform.backward import windows_held, windows_passing
from fusedhead.kernels.transform.transform import Transform


def workspace(
    n: int,
    v: int,
    d: int,
    k: int,
    dtype: torch.dtype,
    device_type: str,
    products: torch.dtype,
    transform: Transform,
    needs: Needs,
    tokens: int,
    vocab: int,
    accumulate: torch.dtype,
    keep: bool,
    explicit: bool,
) -> int:
    """Bytes at the peak of one sweep over windows of tokens x vocab.

    ``products`` is the dtype of the matrix products (`product_dtypes`). ``keep`` says that a window of exponentials
    [tokens, v] is held (one sweep for loss and gradients) and ``explicit`` that dz is written out (`dlogits`,
    `statistics`) and not only exponentials.
    """
    work, wide = products, stat_dtype(dtype)
    kept = kept_dtype(dtype, products, transform) if keep else work
    narrow, widened = kept != wide, work != dtype
    tokens = max(1, min(tokens, n))
    columns = block_columns(tokens, min(vocab, v), wide.itemsize)
    if kept != work:
        columns = widened_columns(tokens, columns, d, wide.itemsize)
    block = tokens * columns
    wide_columns = strip_columns(tokens, columns, wide.itemsize) if keep and narrow else columns
    wide_block = tokens * wide_columns
    blocks = block * work.itemsize * (not keep) + wide_block * wide.itemsize * narrow
    held = windows_held(transform, needs.cols and explicit, needs.rows) - 1
    pieces = not explicit and device_type == "cpu"
    piece = (piece_rows(tokens, wide_columns, wide.itemsize) if pieces else tokens) * wide_columns
    blocks += piece * wide.itemsize * (held + windows_passing(transform))
    blocks += wide_block * wide.itemsize * (2 if explicit else 0)
    if keep:
        blocks += tokens * v * kept.itemsize
    hidden = tokens * d
    rows = hidden * wide.itemsize * (needs.h + narrow)  # E w, and h widened where logits must be exact
    rows += hidden * work.itemsize * ((needs.w or needs.cols) + widened + (narrow and needs.h))
    weights = (columns if widened else wide_columns) * d * (wide.itemsize if widened or narrow else 0)
    weights += columns * d * work.itemsize if needs.w and accumulate != work else 0
    sums = v * d * wide.itemsize if needs.w and accumulate != dtype else 0
    late = n * k * 48 if needs.w and accumulate != wide else 0
    plain = transform.plain_scale is not None
    columns_wise = v * wide.itemsize * 4 * (needs.cols or not plain or explicit)
    by_row = rows_workspace(n, v, d, k, tokens, wide, row_dtype(device_type))
    return blocks + rows + weights + sums + late + columns_wise + by_row


def rows_workspace(
    n: int,
    v: int,
    d: int,
    k: int,
    tokens: int,
    wide: torch.dtype = torch.float32,
    fine: torch.dtype = torch.float64,
) -> int:
    """Bytes of the sampled level, row vectors and gathered rows of labels in windows of ``tokens``."""
    sampled = min(SAMPLED_COLUMNS * 2, v)
    sample = (tokens * 4 + d) * sampled * wide.itemsize
    vectors = (tokens * (k + 1) * 16 + n * k * 4) * fine.itemsize
    return sample + vectors + 4 * min(GATHER_BYTES, n * max(1, k) * d * fine.itemsize)


def whole_bytes(
    n: int, v: int, d: int, dtype: torch.dtype, work: torch.dtype, transform: Transform, needs: Needs
) -> int:
    """Bytes at the peak where all logits [n, v] are built together (`whole`), by products in the dtype ``work``."""
    wide = stat_dtype(dtype)
    held = windows_held(transform, needs.cols, needs.rows) + windows_passing(transform)
    logits = n * v * (wide.itemsize * held + (work.itemsize if work != wide else 0))
    widened = (n + v) * d * work.itemsize if work != dtype else 0
    return logits + widened + n * 16 * wide.itemsize + 2 * v * wide.itemsize * (needs.cols or bool(transform.steps))
