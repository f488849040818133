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
    """What exp is relative to in one window: 2^(L z - binary) is computed, with L near log2 e, and binary = L natural.

    L is what `binary_factor` says, so that a level of any size is where the exponentials say it is.
    """

    binary: Tensor  # [m] finite, in the statistics' dtype; for a plain z exact in the products' dtype
    natural: Tensor  # [m] fine
    exact: bool  # whether logits are to be computed in the statistics' dtype, whatever the products'
    shift: Tensor  # [m, 1] -binary, in the products' dtype if they subtract it


@lru_cache(maxsize=256)
def binary_factor(transform: Transform, wide: torch.dtype) -> float:
    """L, by which `fill` turns z into an exponent of 2: log2 e, rounded as a constant of an op in ``wide`` is.

    Where z is c h wᵀ, the constant that is rounded is c log2 e. L is off by up to 1e-8 of itself: 1e-4 of an exponent
    of 1e4, were it taken for log2 e.
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
    """The dtype in which the logits of window i are computed where a block of them is read as it is, without a level.

    That of the products; wide where narrow ones would be far from 0. (Asked on the CPU only, elsewhere the answer would
    have to be waited for.)
    """
    work, wide = product_dtype(head.h.dtype, head.h.device.type), stat_dtype(head.h.dtype)
    if work == wide or head.h.device.type != "cpu" or i.stop == i.start:
        return work
    return wide if bool(sampled_level(head, i, work).abs().amax() > FAR) else work


def usual_level(head: Head, i: slice, labelled: Tensor, aim: float | None = None) -> Level:
    """A level that serves most data, and no lse need be known for it; the row sums tell whether it did.

    ``labelled`` [m, K] are the logits of the labels: where one is likely, it is where z - level must round least.
    With ``aim`` it is where the row sums come out about that large.
    """
    if aim is not None:
        log_v = math.log(max(1, len(head.w)))
        lse = above(sampled_level(head, i, product_dtype(head.h.dtype, head.h.device.type)) + log_v, labelled)
        return level_at(head, lse - math.log(aim), True)
    work, wide = product_dtype(head.h.dtype, head.h.device.type), stat_dtype(head.h.dtype)
    level = above(sampled_level(head, i, work), labelled)
    far = work != wide and level.numel() > 0 and bool(level.abs().amax() > FAR)
    return level_at(head, above(sampled_level(head, i, wide), labelled) if far else level, far)


def below_maximum(head: Head, i: slice, columns: int, aim: float | None, exact: bool) -> Level:
    """The largest logit of each row, by a sweep in blocks of ``columns``; with ``aim`` where its E is that large.

    It is of the logits that `fill` computes: a maximum of products in bfloat16 is off by 64 where z is 1e4.
    """
    work, wide = product_dtype(head.h.dtype, head.h.device.type), stat_dtype(head.h.dtype)
    most = row_maximum(head, i, columns, wide if exact else work)
    return level_at(head, most if aim is None else most - math.log(aim), exact)


def above(level: Tensor, labelled: Tensor) -> Tensor:
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
    whole = scale is not None or head.h.device.type != "cpu"  # three ops in place gain nothing by pieces
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
    """Transformed logits of the labels of window i and the transform's slope there: both [m, K], fine.

    ``raw`` are the logits before it, where they are known.

    The logits are numbers of the statistics' dtype, as the ones handed out: a likely label's loss, lse - z, would
    otherwise be what rounding takes off z, and less than 0 half of the time.
    """
    raw = label_logits(head, i) if raw is None else raw
    cols, rows = label_vectors(head, i)
    z, tape = apply_and_record(head.transform, raw, cols, rows, False, False)
    rounded = z.to(stat_dtype(head.h.dtype)).to(z.dtype)
    return rounded, pull_back(head.transform, torch.ones_like(z), tape, cols, rows, None, None)


def label_writer(head: Head, i: slice) -> Callable[[Tensor, slice], object]:
    """A function of a block z [m, v] of window i and its columns v: it sets the labels' cells to the logits handed out.

    Then 1 - p of a likely label is no difference of two roundings of its logit. It leaves logits of two bytes, whose
    products round more than that, as they are.
    """
    wide = stat_dtype(head.h.dtype)
    if head.h.dtype != wide or not head.y.shape[1]:
        return lambda z, v: None
    cells, logits = label_cells(head, i), label_terms(head, i)[0].to(wide)
    return lambda z, v: put_labels(z, label_blanks(cells, v), logits)
