"""Shared parts of the torch engine's sweeps: cutting z into cache-sized blocks, and arithmetic on labels.

A sweep walks over windows of tokens and, inside each, over blocks of vocabulary that the matrix products of the
gradients read. Where a whole window is kept in a narrow dtype, a block is filled strip by strip, so that only a strip's
logits exist in float32. Labels are computed separately from the blocks: their logits are row products in float64, their
cells in a block are blanked, and their share of every result is added with full precision.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fusedhead.kernels.contract import Head, stat_dtype
from fusedhead.kernels.transform.transform import apply

EXP2_FACTOR = math.log2(math.e)  # exp x = exp2(x log2 e): torch's exp2 is three times faster than its exp on a CPU
BLOCK_BYTES = 8 << 20  # of one block of float32 logits: it shares a third-level cache; smaller costs 5-20 %
STRIP_BYTES = 5 << 18  # of one strip of float32 logits: it stays in two cores' own caches, with its rows of w
PIECE_BYTES = 1 << 19  # of the rows that a chain of steps takes at once: they stay in a second-level cache between ops
BLOCK_COLUMNS = 512  # fewer columns than this make the matrix products slow
EVEN = 128  # columns come in multiples of this: an odd number of 64s is not shared evenly by threads
GATHER_BYTES = 1 << 19  # of rows of w gathered at once
SAMPLED_COLUMNS = 256  # columns that estimate where a row's logits lie


def cuts(total: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most ``size`` that cover ``total``."""
    size = max(1, size)
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


def block_columns(tokens: int, vocab: int, itemsize: int) -> int:
    """Columns of one block, for a window of ``tokens`` rows whose plan allows ``vocab`` columns."""
    fit = BLOCK_BYTES // max(1, tokens * itemsize)
    return max(1, min(vocab, max(BLOCK_COLUMNS, fit // EVEN * EVEN)))


def strip_columns(tokens: int, columns: int, itemsize: int) -> int:
    """Columns of one strip, for a window of ``tokens`` rows and blocks of ``columns``."""
    fit = STRIP_BYTES // max(1, tokens * itemsize)
    return max(1, min(columns, max(BLOCK_COLUMNS, fit // EVEN * EVEN)))


def widened_columns(tokens: int, columns: int, hidden: int, itemsize: int) -> int:
    """Columns of one strip that is widened to be multiplied, with its rows of w [columns, hidden]: half a strip."""
    fit = min(STRIP_BYTES // 2 // max(1, tokens * itemsize), BLOCK_BYTES // max(1, hidden * itemsize))
    return max(1, min(columns, max(BLOCK_COLUMNS, fit // EVEN * EVEN)))


def piece_rows(tokens: int, columns: int, itemsize: int) -> int:
    """Rows that a chain of steps takes at once, of a block of ``tokens`` rows and ``columns``."""
    return max(1, min(tokens, PIECE_BYTES // max(1, columns * itemsize)))


def row_dtype(device_type: str) -> torch.dtype:
    """The dtype of a sweep's row vectors between their roundings: float64 where the device has it."""
    return torch.float32 if device_type == "mps" else torch.float64


def two_sum_error(total: Tensor, whole: Tensor, part: Tensor) -> Tensor:
    """The rounding error of ``total`` = whole + part, exact (Knuth's two-sum); 0 where it is not finite."""
    back = total - whole
    low = (whole - (total - back)) + (part - back)
    return low.nan_to_num_(0, 0, 0)


def block_vectors(head: Head, i: slice, v: slice) -> tuple[Tensor, Tensor]:
    """The column and row vectors of one block, in the statistics' dtype: [C, v] and [R, m]."""
    wide = stat_dtype(head.h.dtype)
    cols = head.cols[:, v].to(wide) if head.cols.dim() == 2 else head.cols
    rows = head.rows[:, i].to(wide) if head.rows.dim() == 2 else head.rows
    return cols, rows


def label_vectors(head: Head, i: slice) -> tuple[Tensor, Tensor]:
    """The vectors at the labels of window i, in `row_dtype`: column vectors [C, m, K], row vectors [R, m]."""
    fine = row_dtype(head.h.device.type)
    cols = head.cols[:, head.y[i]].to(fine) if head.cols.dim() == 2 else head.cols
    rows = head.rows[:, i].to(fine) if head.rows.dim() == 2 else head.rows
    return cols, rows


def label_rows(head: Head, i: slice, k: int, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """(tokens counted from i.start, the rows of w of their k-th label) over window i, `GATHER_BYTES` at a time."""
    for at in cuts(i.stop - i.start, GATHER_BYTES // max(1, head.w.shape[1] * dtype.itemsize)):
        yield at, head.w.index_select(0, head.y[i.start + at.start : i.start + at.stop, k]).to(dtype)


def label_logits(head: Head, i: slice) -> Tensor:
    """h_i · w[y_ik] for the labels of window i, before the transform: [m, K] in `row_dtype`."""
    fine = row_dtype(head.h.device.type)
    z = head.h.new_empty((i.stop - i.start, head.y.shape[1]), dtype=fine)
    for k in range(head.y.shape[1]):
        for at, rows in label_rows(head, i, k, fine):
            z[at, k] = rows.mul_(head.h[i][at]).sum(1)
    return z


def first_of_equal(y: Tensor) -> Tensor:
    """[m, K] -> [m, K] bool: True at the first label of each column in a row, so that no column counts twice."""
    if y.shape[1] < 2:
        return torch.ones_like(y, dtype=torch.bool)
    return ~torch.tril(y[:, :, None] == y[:, None, :], -1).any(2)


class Cells(NamedTuple):
    """Positions of the labels in a window."""

    y: Tensor  # [m, K]
    tokens: Tensor  # [m·K] on a CPU, sorted by column
    columns: Tensor  # [m·K] on a CPU, sorted
    column_list: list[int] | None  # the columns as a list; None on a GPU, where reading them would wait
    zero: Tensor  # [] in the dtype of the logits


def label_cells(head: Head, i: slice) -> Cells:
    """The cells of the labels of window i."""
    y, zero = head.y[i], head.h.new_zeros((), dtype=stat_dtype(head.h.dtype))
    if y.device.type != "cpu":
        return Cells(y, y, y, None, zero)
    columns, order = y.reshape(-1).sort()
    return Cells(y, order // max(1, y.shape[1]), columns, columns.tolist(), zero)


class Blanks(NamedTuple):
    """Positions of the labels in one block of columns, by row, for `blank_labels`."""

    cells: Cells
    v: slice
    tokens: Tensor  # [labels in the block] on a CPU, ascending
    columns: Tensor  # [labels in the block], counted from v.start
    token_list: list[int]  # the tokens as a list


def label_blanks(cells: Cells, v: slice) -> Blanks:
    """The labels' cells in the block of the columns v."""
    if cells.column_list is None:
        return Blanks(cells, v, cells.tokens, cells.columns, [])
    some = slice(bisect_left(cells.column_list, v.start), bisect_left(cells.column_list, v.stop))
    if some.start == some.stop:
        return Blanks(cells, v, cells.tokens[some], cells.columns[some], [])
    tokens, order = cells.tokens[some].sort()
    return Blanks(cells, v, tokens, cells.columns[some][order] - v.start, tokens.tolist())


def blank_labels(block: Tensor, blanks: Blanks, r: slice) -> None:
    """Zero, in the rows r [r, v] of a block, the cells of the labels."""
    cells, v = blanks.cells, blanks.v
    if cells.column_list is not None:
        some = slice(bisect_left(blanks.token_list, r.start), bisect_left(blanks.token_list, r.stop))
        if some.start < some.stop:
            block.index_put_((blanks.tokens[some] - r.start, blanks.columns[some]), cells.zero)
        return
    for k in range(cells.y.shape[1]):
        column = cells.y[r, k : k + 1] - v.start
        inside = (column >= 0) & (column < v.stop - v.start)
        column.clamp_(0, v.stop - v.start - 1)
        block.scatter_(1, column, block.gather(1, column).masked_fill_(inside, 0))


def put_labels(block: Tensor, blanks: Blanks, values: Tensor) -> None:
    """Set the cells of the labels in a block [m, v] to ``values`` [m, K]."""
    cells, v = blanks.cells, blanks.v
    if cells.column_list is not None and not blanks.token_list:
        return
    for k in range(cells.y.shape[1]):
        column = cells.y[:, k : k + 1] - v.start
        inside = (column >= 0) & (column < v.stop - v.start)
        column = column.clamp_(0, v.stop - v.start - 1)
        block.scatter_(1, column, torch.where(inside, values[:, k : k + 1], block.gather(1, column)))


def sampled_level(head: Head, i: slice, work: torch.dtype) -> Tensor:
    """An estimate of log mean exp z from evenly spaced columns: [m], finite. ``work`` is the dtype of the product.

    Exponentials are taken relative to it, since most of a row's probability lies near it, and a bfloat16 z - level
    rounds least where z is near the level.
    """
    step = max(1, head.w.shape[0] // SAMPLED_COLUMNS)
    v = slice(0, head.w.shape[0], step)
    z = head.h[i].to(work) @ head.w[v].to(work).t()
    z = apply(head.transform, z.to(stat_dtype(head.h.dtype)), *block_vectors(head, i, v))
    level = torch.logsumexp(z, 1) - math.log(max(1, z.shape[1]))
    return torch.where(level.isfinite(), level, 0)


def row_maximum(head: Head, i: slice, columns: int, work: torch.dtype) -> Tensor:
    """The largest z of each row, by an additional sweep: [m], 0 where not finite. ``work`` is the product's dtype."""
    wide = stat_dtype(head.h.dtype)
    most = head.h.new_full((i.stop - i.start,), -torch.inf, dtype=wide)
    h = head.h[i].to(work)
    for v in cuts(head.w.shape[0], columns):
        z = apply(head.transform, (h @ head.w[v].to(work).t()).to(wide), *block_vectors(head, i, v))
        most = torch.maximum(most, z.amax(1))
    return torch.where(most.isfinite(), most, 0)
