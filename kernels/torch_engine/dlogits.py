"""The general gradient: dz is written out block by block in float32, then multiplied.

For the upstream gradients and transforms that `softmax_gradients` does not serve: the entropy,
weighted sums of transformed logits, gradients of row vectors and of multipliers. FLOP 6 NDV, the lse being
known. Memory: a block of logits for each of z, dz and the transform's tape, and [windows.tokens, D] in
float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusedhead.kernels.contract import (
    Head,
    HeadGrads,
    LogitGrads,
    Needs,
    RowGrads,
    RowStats,
    Windows,
    logit_grads,
    stat_dtype,
)
from fusedhead.kernels.torch_engine.blocks import EXP2_FACTOR, block_columns, block_vectors, cuts, piece_rows
from fusedhead.kernels.torch_engine.exponentials import block_buffers, label_writer, window_products
from fusedhead.kernels.torch_engine.gradient_sink import accumulate_product
from fusedhead.kernels.torch_engine.product_dtypes import product_dtype
from fusedhead.kernels.torch_engine.weight_gradient import BlockWeightGradient
from fusedhead.kernels.transform.backward import apply_and_record, pull_back


def dlogits_of_block(head: Head, grads: LogitGrads, stats: RowStats, i: slice, v: slice, z: Tensor) -> Tensor:
    """dz of the transformed block z [m, v]. The block itself is overwritten with log p."""
    wide = z.dtype
    if grads.soft:
        z.sub_(stats.lse[i, None].to(wide))
        if stats.lse_low is not None:
            z.sub_(stats.lse_low[i, None].to(wide))
    dz = (z * EXP2_FACTOR).exp2_() if grads.soft else torch.zeros_like(z)
    slope = head.h.new_zeros(len(z), dtype=wide)
    if grads.soft:
        slope = slope + 0 * stats.lse[i].to(wide)  # a row with an infinite logit has NaN throughout, as in log_softmax
    if grads.constant is not None:
        slope = slope + grads.constant[i].to(wide)
    if grads.quadratic is not None and grads.linear is not None and stats.entropy is not None:
        z.add_(stats.entropy[i, None].to(wide))
        linear, quadratic = grads.linear[i, None].to(wide), grads.quadratic[i, None].to(wide)
        for r in cuts(len(z), piece_rows(len(z), z.shape[1], z.element_size())):  # a third value of a piece alone
            dz[r].mul_((z[r] * quadratic[r]).sub_(linear[r]).mul_(z[r]).add_(slope[r, None]))
    elif grads.linear is not None and stats.entropy is not None:
        g = grads.linear[i, None].to(wide)
        z.mul_(-g).add_((slope - g[:, 0] * stats.entropy[i].to(wide))[:, None])
        dz.mul_(z)
    else:
        dz.mul_(slope[:, None])
    if grads.sum is not None:
        g = grads.sum[i, None].to(wide)
        dz.addcmul_(g, head.u[v].to(wide)[None]) if head.u.numel() else dz.add_(g)
    if grads.picked is not None:
        column = head.y[i] - v.start
        inside = (column >= 0) & (column < z.shape[1])
        share = grads.picked[i].to(wide).masked_fill(~inside, 0)
        dz.scatter_add_(1, column.clamp_(0, z.shape[1] - 1), share)
    return dz


def backward(head: Head, upstream: RowGrads, stats: RowStats, needs: Needs, windows: Windows) -> HeadGrads:
    """The gradients for any upstream, given what they read of the statistics (`contract.Statistic.reads`)."""
    grads = logit_grads(upstream, stats)
    n, vocab = len(head.h), len(head.w)
    wide, work = stat_dtype(head.h.dtype), product_dtype(head.h.dtype, head.h.device.type)
    tokens = min(windows.tokens, n)
    columns = block_columns(tokens, min(windows.vocab, vocab), wide.itemsize)
    buffers = block_buffers(head, tokens, columns)
    dh = head.h.new_empty(head.h.shape, dtype=windows.dh_dtype(head)) if needs.h else None
    dw = BlockWeightGradient(head, windows.accumulate) if needs.w else None
    dcols = torch.zeros_like(head.cols, dtype=wide) if needs.cols else None
    drows = torch.zeros_like(head.rows, dtype=wide) if needs.rows else None
    for i in cuts(n, tokens):
        h, logits_in = head.h[i].to(work), window_products(head, i)
        m = len(h)
        product = head.h.new_zeros((m, head.h.shape[1] if needs.h else 0), dtype=wide)
        write_labels = label_writer(head, i) if grads.soft else None
        for v in cuts(vocab, columns):
            size = m * (v.stop - v.start)
            w, raw = head.w[v].to(work), buffers.work[:size].view(m, -1)
            if logits_in == work:
                torch.mm(h, w.t(), out=raw)
                z = raw if work == wide else buffers.wide[:size].view(m, -1).copy_(raw)
            else:
                z = torch.mm(h.to(wide), w.to(wide).t(), out=buffers.wide[:size].view(m, -1))
            cols, rows = block_vectors(head, i, v)
            z, tape = apply_and_record(head.transform, z, cols, rows, needs.cols, needs.rows)
            if write_labels is not None:
                write_labels(z, v)
            dz = dlogits_of_block(head, grads, stats, i, v, z)
            to_cols = None if dcols is None else dcols[:, v]
            to_rows = None if drows is None else drows[:, i]
            dz = pull_back(head.transform, dz, tape, cols, rows, to_cols, to_rows)
            if needs.h:
                # Unrounded also where products are bfloat16: block by block that would round dh more than eager does.
                accumulate_product(product, dz, w.to(wide))
            if dw is not None:
                dw.add_block(v, i.start == 0, dz if work == wide else raw.copy_(dz), h)
        if dh is not None:
            dh[i] = product
    return HeadGrads(
        dh,
        None if dw is None else dw.finish(),
        None if dcols is None else dcols.to(head.cols.dtype),
        None if drows is None else drows.to(head.rows.dtype),
    )
