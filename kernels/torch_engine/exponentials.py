"""Blocks of E = exp(z - level), from which a softmax's statistics and gradients are computed.

With a finite level for each row, chosen before z is known, probabilities are p = E exp(level - lse). The factor belongs
to a row, so it can be applied to [N, D] operands and no pass over z is needed once its sum is known. What goes into the
matrix products of the backward is E' = E ∂z/∂(h wᵀ). Labels are left out (`blank_labels`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from fusedhead.kernels.contract import Head, stat_dtype
from fusedhead.kernels.torch_engine.blocks import (
    EXP2_FACTOR,
    Cells,
    blank_labels,
    block_vectors,
    cuts,
    label_blanks,
    label_cells,
    label_logits,
    label_vectors,
    piece_rows,
    put_labels,
    row_dtype,
    row_maximum,
    sampled_level,
)
from fusedhead.kernels.torch_engine.product_dtypes import product_dtype
from fusedhead.kernels.transform.backward import Tape, apply_and_record, pull_back
from fusedhead.kernels.transform.transform import Transform

FAR = 64.0  # a bfloat16 product cannot subtract a level further from 0 than this without losing a fraction of 1


class Level(NamedTuple):
    """The reference of the exponentials of one window, by row: 2^(L z - binary) is computed, and binary = L natural.

    L is the `binary_factor`, the same number that multiplies z, so that both forms name one level however large it is.
    """

    binary: Tensor  # [m] finite, in the statistics' dtype; for a plain z exact in the products' dtype
    natural: Tensor  # [m] in `row_dtype`
    exact: bool  # whether logits are computed in the statistics' dtype, whatever the products' dtype
    shift: Tensor  # [m, 1] -binary, in the products' dtype if they subtract it


@lru_cache(maxsize=256)
def binary_factor(transform: Transform, wide: torch.dtype) -> float:
    """The factor L by which `fill` turns z into an exponent of 2: log2 e as ``wide`` rounds it.

    Where z is c h wᵀ, the rounded constant is c log2 e. L differs from log2 e by up to 1e-8 of itself, which is 1e-4 at
    an exponent of 1e4, so a level has to use L and not log2 e.
    """
    scale = transform.plain_scale or 1.0
    return torch.tensor(EXP2_FACTOR * scale, dtype=wide).item() / scale


def level_at(head: Head, at: Tensor, exact: bool) -> Level:
    """The level nearest to ``at`` [m] that a block can subtract without error."""
    work, wide = product_dtype(head.h.dtype, head.h.device.type), stat_dtype(head.h.dtype)
    binary = (at * EXP2_FACTOR).to(wide)
    shift = -binary[:, None]
    if work != wide and not exact and head.transform.plain_scale is not None:
        shift = shift.to(work)
        binary = -shift[:, 0].to(wide)
    natural = binary.to(row_dtype(head.h.device.type)) / binary_factor(head.transform, wide)
    return Level(binary, natural, exact, shift)


def window_products(head: Head, i: slice) -> torch.dtype:
    """The dtype of the logits of window i, for a sweep that reads them without subtracting a level.

    It is the products' dtype, or the statistics' where logits of two bytes would be far from 0 and round too much. On a
    GPU the logits are not looked at, since the host would wait.
    """
    work, wide = product_dtype(head.h.dtype, head.h.device.type), stat_dtype(head.h.dtype)
    if work == wide or head.h.device.type != "cpu" or i.stop == i.start:
        return work
    return wide if bool(sampled_level(head, i, work).abs().amax() > FAR) else work


def usual_level(head: Head, i: slice, labelled: Tensor, aim: float | None = None) -> Level:
    """A level estimated before the sweep, without the lse. The row sums show afterwards whether it was good enough.

    ``labelled`` [m, K] are the logits of the labels: near a likely label z - level must round least. With ``aim`` the
    level is placed so that the row sums are about that large.
    """
    if aim is not None:
        log_v = math.log(max(1, len(head.w)))
        lse = max_with_labels(sampled_level(head, i, product_dtype(head.h.dtype, head.h.device.type)) + log_v, labelled)
        return level_at(head, lse - math.log(aim), True)
    work, wide = product_dtype(head.h.dtype, head.h.device.type), stat_dtype(head.h.dtype)
    level = max_with_labels(sampled_level(head, i, work), labelled)
    far = work != wide and level.numel() > 0 and bool(level.abs().amax() > FAR)
    return level_at(head, max_with_labels(sampled_level(head, i, wide), labelled) if far else level, far)


def below_maximum(head: Head, i: slice, columns: int, aim: float | None, exact: bool) -> Level:
    """The level at each row's largest logit, by a sweep in blocks of ``columns``; with ``aim`` its E is that large.

    The maximum is that of the logits `fill` computes: the maximum of bfloat16 products is off by 64 where z is 1e4.
    """
    work, wide = product_dtype(head.h.dtype, head.h.device.type), stat_dtype(head.h.dtype)
    most = row_maximum(head, i, columns, wide if exact else work)
    return level_at(head, most if aim is None else most - math.log(aim), exact)


def max_with_labels(level: Tensor, labelled: Tensor) -> Tensor:
    """The larger of a level [m] and the finite logits of the labels."""
    if not labelled.shape[1]:
        return level
    largest = labelled.amax(1).to(level.dtype)
    return torch.where(largest.isfinite(), torch.maximum(level, largest), level)


class Block(NamedTuple):
    """Buffers for one block, reused by every block of a sweep."""

    work: Tensor  # [≥ m·v] flat, dtype of the matrix products
    wide: Tensor  # [≥ m·v] flat, dtype of the statistics; empty where that is the same


def block_buffers(head: Head, tokens: int, columns: int) -> Block:
    """Buffers for blocks of at most tokens x columns."""
    work, wide = product_dtype(head.h.dtype, head.h.device.type), stat_dtype(head.h.dtype)
    size = tokens * columns
    return Block(
        head.h.new_empty(size, dtype=work),
        head.h.new_empty(size if work != wide else 0, dtype=wide),
    )


def fill(
    head: Head,
    i: slice,
    v: slice,
    h: Tensor,
    w: Tensor,
    level: Level,
    cells: Cells,
    out: Tensor,
    spare: Tensor,
    wanted: bool = True,
) -> list[Tensor]:
    """Write E' [m, v] of one block into ``out`` and return parts [m] of the row sums of E, both without labels.

    h [m, D] and w [v, D] are the operands in the dtype of the products, ``cells`` the labels of the window and
    ``spare`` a flat wide buffer: its size says how many columns are filled at once, if ``out`` is narrower.
    Row sums are taken before E is rounded to ``out``; where E' is not ``wanted``, they are all that is computed.
    """
    m, n = out.shape
    wide = level.binary.dtype
    h = h.to(wide) if level.exact else h
    narrow, scale = out.dtype != wide, head.transform.plain_scale
    shifted = narrow and scale is not None and not level.exact
    whole = scale is not None or head.h.device.type != "cpu"  # three in-place ops are no faster in pieces
    totals = []
    for s in cuts(n, spare.numel() // m if narrow else n):
        strip, w_strip, columns = out[:, s], w[s], slice(v.start + s.start, v.start + s.stop)
        z = spare[: strip.numel()].view(strip.shape) if narrow else strip
        if shifted:
            # The product rounds z - level, not z: near 0 that loses less.
            product = torch.addmm(level.shift, h, w_strip.t(), alpha=(scale or 1.0) * EXP2_FACTOR, out=strip)
        elif narrow and not level.exact:
            product = torch.mm(h, w_strip.t(), out=strip)
        else:
            product = torch.mm(h, w_strip.to(h.dtype).t(), out=z)
        blanks, total = label_blanks(cells, columns), z.new_empty(m)
        cols, rows = block_vectors(head, i, columns)
        for r in cuts(m, m if whole else piece_rows(m, z.shape[1], z.element_size())):
            x = z[r] if product is z else z[r].copy_(product[r])
            own_rows = rows[:, r] if rows.dim() == 2 else rows
            tape: Tape = []
            if scale is None:
                x, tape = apply_and_record(head.transform, x, cols, own_rows, False, False)
            if not shifted:
                torch.add(level.shift[r], x, alpha=EXP2_FACTOR * (1.0 if scale is None else scale), out=x)
            blank_labels(x.exp2_(), blanks, r)
            torch.sum(x, 1, out=total[r])
            if scale is None and wanted:
                x = pull_back(head.transform, x, tape, cols, own_rows, None, None)
            if wanted and x.data_ptr() != strip[r].data_ptr():
                strip[r] = x
        totals.append(total)
    return totals


def label_terms(head: Head, i: slice, raw: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Transformed logits of the labels of window i and the transform's slope there: both [m, K] in `row_dtype`.

    ``raw`` are the logits before the transform, where they are known.

    The logits are rounded to the statistics' dtype, as those that the op returns. Otherwise the loss of a likely label,
    lse - z, would be the rounding error of z, and negative half of the time.
    """
    raw = label_logits(head, i) if raw is None else raw
    cols, rows = label_vectors(head, i)
    z, tape = apply_and_record(head.transform, raw, cols, rows, False, False)
    rounded = z.to(stat_dtype(head.h.dtype)).to(z.dtype)
    return rounded, pull_back(head.transform, torch.ones_like(z), tape, cols, rows, None, None)


def label_writer(head: Head, i: slice) -> Callable[[Tensor, slice], object]:
    """A function that sets the labels' cells of a block z [m, v] of window i to the logits that the op returns.

    Then 1 - p of a likely label is not the difference of two roundings of its logit. Logits of two bytes stay as they
    are, since their products round more than that.
    """
    wide = stat_dtype(head.h.dtype)
    if head.h.dtype != wide or not head.y.shape[1]:
        return lambda z, v: None
    cells, logits = label_cells(head, i), label_terms(head, i)[0].to(wide)
    return lambda z, v: put_labels(z, label_blanks(cells, v), logits)
