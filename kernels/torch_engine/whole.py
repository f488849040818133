"""Whole logits: a small head in the calls of torch that the plain program would make.

The three functions of `contract` for logits too few for windows to pay: one product z = h wᵀ [N, V], its softmax, and
the gradients' two products, in about as many calls as eager code takes. The host's time a call decides the cost of such
a head, not the memory. Other statistics than lse, picked and sums, and gradients of any per-row upstream come from the
window engine's own sweeps over a single block.

    head_loss            z, E = exp(z - max z), dz in the place of E, dh, dw       3 products
    head_stats           z, E                                                     1 product
    head_stats_backward  `torch_engine.dlogits` on one block                       3 products, 2 of a kept z
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fusedhead.kernels.contract import (
    NO_NEEDS,
    Head,
    HeadGrads,
    Needs,
    RowGrads,
    RowStats,
    Windows,
    logit_grads,
    stat_dtype,
)
from fusedhead.kernels.torch_engine import dlogits as torch_dlogits
from fusedhead.kernels.torch_engine import engine as torch_engine
from fusedhead.kernels.torch_engine.blocks import block_vectors, two_sum_error
from fusedhead.kernels.torch_engine.product_dtypes import product_dtype
from fusedhead.kernels.transform.backward import Tape, apply_and_record, pull_back

ALL = frozenset({"lse", "picked", "sum", "spread"})  # the statistics that one softmax gives


class Softmax(NamedTuple):
    """The softmax of all rows, not yet divided by its sums."""

    e: Tensor  # [N, V] exp(z - most), in the place of z
    most: Tensor  # [N] the largest z, 0 where it is not finite
    total: Tensor  # [N] row sums of e
    picked: Tensor  # [N, K] z at the labels
    summed: Tensor | None  # [N] Σ u z, where asked
    spread: Tensor | None  # [N] Σ u (lse - z), with the sum
    tape: Tape


def softmax(
    head: Head, needs: Needs, cols: Tensor, rows: Tensor, summed: bool, product: Tensor | None = None
) -> Softmax:
    """FLOP 2 N D V; memory: z [N, V] in the dtype of the statistics, and the transform's tape. ``product`` <- h wᵀ."""
    work, wide = product_dtype(head.h.dtype, head.h.device.type), stat_dtype(head.h.dtype)
    z = torch.mm(head.h.to(work), head.w.to(work).t(), out=product).to(wide, copy=product is not None)
    z, tape = apply_and_record(head.transform, z, cols, rows, needs.cols, needs.rows)
    picked = z.gather(1, head.y)
    u = head.u.to(wide)
    total_u = None
    if summed:
        total_u = torch.mv(z, u) if u.numel() else z.sum(1)
    most = z.amax(1).nan_to_num_(0, 0, 0)
    z.sub_(most[:, None])
    shifted = None
    if summed:  # a second sum, without the digits that all logits of a row share
        shifted = torch.mv(z, u) if u.numel() else z.sum(1)
    e = z.exp_()
    total = e.sum(1)
    spread = None if shifted is None else total.log() * (u.sum() if u.numel() else len(head.w)) - shifted
    return Softmax(e, most, total, picked, total_u, spread, tape)


def statistics(of: Softmax, want: frozenset[str]) -> RowStats:
    """The statistics that are asked for; the lse as the sum of two numbers."""
    log_total = of.total.log()
    lse = of.most + log_total
    return RowStats(
        lse,
        of.picked if "picked" in want else None,
        of.summed if "sum" in want else None,
        lse_low=two_sum_error(lse, of.most, log_total),
        spread=of.spread if "spread" in want else None,
    )


def head_stats(head: Head, want: frozenset[str], windows: Windows, product: Tensor | None = None) -> RowStats:
    """The statistics in ``want``, see `contract.RowStats`; ``product`` [N, V] <- h wᵀ, in the dtype of products."""
    if not want <= ALL or not len(head.w):
        if product is not None:
            torch.mm(head.h.to(product.dtype), head.w.to(product.dtype).t(), out=product)
        return torch_engine.head_stats(head, want, windows)
    cols, rows = block_vectors(head, slice(None), slice(None))
    return statistics(softmax(head, NO_NEEDS, cols, rows, bool(want & {"sum", "spread"}), product), want)


def head_stats_backward(
    head: Head, upstream: RowGrads, stats: RowStats, needs: Needs, windows: Windows, product: Tensor | None = None
) -> HeadGrads:
    """The gradients for any per-row upstream, from h wᵀ where ``product`` holds it."""
    if not len(head.w):
        return torch_engine.head_stats_backward(head, upstream, stats, needs, windows)
    if product is None:
        return torch_dlogits.backward(head, upstream, stats, needs, windows)
    cols, rows = block_vectors(head, slice(None), slice(None))
    z = product.to(stat_dtype(head.h.dtype), copy=True)
    z, tape = apply_and_record(head.transform, z, cols, rows, needs.cols, needs.rows)
    grads = logit_grads(upstream, stats)
    dz = torch_dlogits.dlogits_of_block(head, grads, stats, slice(None), slice(0, len(head.w)), z)
    return head_gradients(head, dz, tape, cols, rows, needs, windows)


def head_loss(head: Head, coefficients: RowGrads, needs: Needs, windows: Windows) -> tuple[RowStats, HeadGrads]:
    """Statistics and gradients of a loss linear in them, the softmax taken once."""
    if not len(head.w):
        return torch_engine.head_loss(head, coefficients, needs, windows)
    c, wide = coefficients, stat_dtype(head.h.dtype)
    cols, rows = block_vectors(head, slice(None), slice(None))
    of = softmax(head, needs, cols, rows, c.sum is not None)
    stats = statistics(of, ALL)
    if not any(needs):
        return stats, HeadGrads(None, None, None, None)
    # a row with an infinite logit has NaN throughout, as in log_softmax: 0 times its sum
    slope = 0 * of.total if c.lse is None else torch.add(c.lse.to(wide), of.total, alpha=0)
    if c.square is not None:
        slope = slope + 2 * c.square.to(wide) * stats.lse
    dz = of.e.mul_((slope / of.total)[:, None])
    if c.picked is not None:
        dz.scatter_add_(1, head.y, c.picked.to(wide))
    if c.sum is not None:
        g = c.sum.to(wide)[:, None]
        dz.addcmul_(g, head.u.to(wide)[None]) if head.u.numel() else dz.add_(g)
    return stats, head_gradients(head, dz, of.tape, cols, rows, needs, windows)


def head_gradients(
    head: Head, dz: Tensor, tape: Tape, cols: Tensor, rows: Tensor, needs: Needs, windows: Windows
) -> HeadGrads:
    """The gradients of the operands from that of the transformed logits [N, V], which is overwritten."""
    dcols = torch.zeros_like(head.cols, dtype=dz.dtype) if needs.cols else None
    drows = torch.zeros_like(head.rows, dtype=dz.dtype) if needs.rows else None
    dz = pull_back(head.transform, dz, tape, cols, rows, dcols, drows)
    return HeadGrads(
        *operand_gradients(head, dz, needs, windows),
        None if dcols is None else dcols.to(head.cols.dtype),
        None if drows is None else drows.to(head.rows.dtype),
    )


def operand_gradients(head: Head, dz: Tensor, needs: Needs, windows: Windows) -> tuple[Tensor | None, Tensor | None]:
    """dh = dz w and dw = dzᵀ h in the operands' dtype, where needed. ``dz`` is rounded as eager code rounds it.

    A dh of another dtype is multiplied in that, so that it is rounded nowhere.
    """
    work = product_dtype(head.h.dtype, head.h.device.type)
    dz = dz.to(work)
    to = windows.dh_dtype(head)
    in_dtype = work if to == head.h.dtype else to
    dh = torch.mm(dz.to(in_dtype), head.w.to(in_dtype)).to(to) if needs.h else None
    dw = torch.mm(dz.t(), head.h.to(work)).to(head.w.dtype) if needs.w else None
    return dh, dw
