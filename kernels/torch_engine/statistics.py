"""The statistics of a head's rows in one sweep over its logits, block by block.

Running sums are relative to a running maximum and merge like the partial softmaxes of tensor-parallel ranks.
FLOP 2 NDV; memory: one block of logits (three for the entropy or a decision), nothing of size [N, V].
The softmax alone has a shorter way, in `softmax_gradients.single_pass` with no gradient asked for.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fusedhead.kernels.contract import DECISIONS, Head, RowStats, Windows, stat_dtype, with_companions
from fusedhead.kernels.torch_engine.blocks import (
    EXP2_FACTOR,
    block_columns,
    block_vectors,
    cuts,
    label_logits,
    label_vectors,
    row_dtype,
    two_sum_error,
)
from fusedhead.kernels.torch_engine.exponentials import block_buffers, label_writer, window_products
from fusedhead.kernels.torch_engine.product_dtypes import product_dtype
from fusedhead.kernels.torch_engine.weighted_sums import spread_from_sums
from fusedhead.kernels.transform.backward import apply_and_record
from fusedhead.kernels.transform.bias_rounding import rounded_bias
from fusedhead.kernels.transform.transform import Transform, apply


class Partial(NamedTuple):
    """A softmax over some columns: Σ exp(z - most) (z - most)^k, [m] each, for k = 0 and, where asked for, 1 and 2."""

    most: Tensor  # the largest z, replaced by 0 where it is not finite
    total: Tensor
    moment: Tensor | None = None
    square: Tensor | None = None


def finite_maximum(z: Tensor) -> Tensor:
    """The largest entry of each row [m], 0 where it is not finite."""
    most = z.amax(1)
    return torch.where(most.isfinite(), most, 0)


def partial_of(z: Tensor, most: Tensor, moments: int) -> Partial:
    """The partial of a block z - most [m, v], which is overwritten; 0, 1 or 2 moments."""
    if not moments:
        return Partial(most, z.mul_(EXP2_FACTOR).exp2_().sum(1))
    e = (z * EXP2_FACTOR).exp2_()
    total = e.sum(1)
    if moments == 1:
        return Partial(most, total, z.mul_(e).sum(1))
    moment = e.mul_(z).sum(1)
    return Partial(most, total, moment, z.mul_(e).sum(1))


def merge(a: Partial, b: Partial) -> Partial:
    """The partial of both sets of columns. Associative; an empty set is (−∞ or any most, 0, 0)."""
    most = torch.where(a.total == 0, b.most, torch.where(b.total == 0, a.most, torch.maximum(a.most, b.most)))
    down_a, down_b = a.most - most, b.most - most
    fade_a, fade_b = down_a.exp(), down_b.exp()
    moment, square = None, None
    if a.moment is not None and b.moment is not None:
        moment = fade_a * (a.moment + down_a * a.total) + fade_b * (b.moment + down_b * b.total)
        if a.square is not None and b.square is not None:
            square_a = a.square + down_a * (2 * a.moment + down_a * a.total)
            square_b = b.square + down_b * (2 * b.moment + down_b * b.total)
            square = fade_a * square_a + fade_b * square_b
    return Partial(most, fade_a * a.total + fade_b * b.total, moment, square)


def picked_logits(head: Head, tokens: int) -> Tensor:
    """z[i, y_ik], without a sweep, ``tokens`` rows at once: [N, K]."""
    out = head.h.new_empty(head.y.shape, dtype=stat_dtype(head.h.dtype))
    for i in cuts(len(head.h), tokens):
        out[i] = apply(head.transform.smooth, label_logits(head, i), *label_vectors(head, i))
    return out


def _better(best: Tensor, top: Tensor) -> Tensor:
    """Whether a later block's best replaces the top so far: strictly larger, or the first NaN."""
    return (best > top) | (best.isnan() & ~top.isnan())


def sweep_statistics(head: Head, want: frozenset[str], windows: Windows) -> RowStats:
    """Every statistic in ``want`` but `sum` of a plain z, which needs no sweep (`weighted_sums`)."""
    n, vocab = len(head.h), len(head.w)
    wide, work = stat_dtype(head.h.dtype), product_dtype(head.h.dtype, head.h.device.type)
    tokens = min(windows.tokens, n)
    columns = block_columns(tokens, min(windows.vocab, vocab), wide.itemsize)
    buffers = block_buffers(head, tokens, columns)
    decide, moments = bool(want & DECISIONS), 2 if "variance" in want else int("entropy" in want)
    soft, summed = "lse" in with_companions(want), bool(want & {"sum", "spread"})
    fine = row_dtype(head.h.device.type)
    out = {name: head.h.new_empty(n, dtype=wide) for name in ("lse", "sum", "entropy", "variance", "max", "lse_low")}
    total = head.h.new_zeros(n, dtype=fine)
    argmax = head.h.new_empty(n, dtype=torch.int64)
    rounds = head.transform.smooth != head.transform
    for i in cuts(n, tokens):
        h = head.h[i].to(window_products(head, i))
        m, chain = len(h), head.transform
        bias = rounded_bias(chain, h.dtype) if decide else None
        if bias is not None:
            chain = Transform(chain.steps[2:])
        state: Partial | None = None
        write_labels = label_writer(head, i) if soft else None
        for v in cuts(vocab, columns):
            size = m * (v.stop - v.start)
            raw, w = (buffers.wide if h.dtype != work else buffers.work)[:size].view(m, -1), head.w[v].to(h.dtype)
            if bias is None:
                torch.mm(h, w.t(), out=raw)
            else:
                torch.addmm(head.cols[bias, v].to(work), h, w.t(), out=raw)
            z = raw if h.dtype == wide else buffers.wide[:size].view(m, -1).copy_(raw)
            cols, rows = block_vectors(head, i, v)
            if decide and rounds:
                best, at = apply(chain, z, cols, rows, decide=True).max(1)
            z, _ = apply_and_record(chain, z, cols, rows, False, False)
            if decide:
                if not rounds:
                    best, at = z.max(1)
                new = _better(best, out["max"][i]) if v.start else torch.ones_like(at, dtype=torch.bool)
                out["max"][i] = torch.where(new, best, out["max"][i])
                argmax[i] = torch.where(new, at + v.start, argmax[i])
            if write_labels is not None:
                write_labels(z, v)
                most = finite_maximum(z)
                z.sub_(most[:, None])
            if summed:  # relative to the maximum: digits that all logits share are not lost in the sum
                u = head.u[v].to(wide) if head.u.numel() else head.u
                part = (z @ u if u.numel() else z.sum(1)).to(fine)
                if soft:
                    part += most.to(fine) * (u.sum(dtype=fine) if u.numel() else z.shape[1])
                total[i] = total[i] + part if v.start else part
            if soft:
                partial = partial_of(z, most, moments)
                state = partial if state is None else merge(state, partial)
        if state is not None:
            log_total = state.total.log()
            out["lse"][i] = lse = state.most + log_total
            out["lse_low"][i] = two_sum_error(lse, state.most, log_total)
            if state.moment is not None:
                mean = state.moment / state.total
                out["entropy"][i] = log_total - mean
                if state.square is not None:
                    out["variance"][i] = state.square / state.total - mean * mean
    if summed:
        out["sum"].copy_(total)
    if "spread" in want:
        out["spread"] = spread_from_sums(head, out["lse"].to(fine) + out["lse_low"].to(fine), total)
    stats = {name: x for name, x in out.items() if name in want}
    stats |= {name: out[name] for name in ("lse", "lse_low")}
    return RowStats(
        **stats,
        picked=picked_logits(head, tokens) if "picked" in want else None,
        argmax=argmax if "argmax" in want else None,
    )
