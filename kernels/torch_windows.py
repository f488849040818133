"""The engine in torch ops: a head computed window by window on any device torch runs on.

The three functions of `contract` over blocks of at most ``windows.tokens`` x ``windows.vocab`` logits.
It must not know how large the windows should be (`fusedhead.lowering.plan` decides) nor what graph asked.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fusedhead.kernels.column_gradients import pull_back, record
from fusedhead.kernels.columns import apply
from fusedhead.kernels.contract import Head, HeadGrads, Needs, RowGrads, RowStats, Windows, stat_dtype


def _cuts(total: int, size: int) -> Iterator[slice]:
    size = max(1, size)
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


def _block(head: Head, i: slice, v: slice, dtype: torch.dtype) -> Tensor:
    return head.h[i].to(dtype) @ head.w[v].to(dtype).t()


def head_stats(head: Head, want: frozenset[str], windows: Windows) -> RowStats:
    n, vocab, dtype = len(head.h), len(head.w), stat_dtype(head.h.dtype)
    ref = head.h.new_full((n,), -torch.inf, dtype=dtype)
    total, moment, weighted = (torch.zeros_like(ref) for _ in range(3))
    picked = head.h.new_zeros(head.y.shape, dtype=dtype)
    top = head.h.new_full((n,), -torch.inf, dtype=dtype)
    where = torch.zeros_like(top, dtype=torch.int64)
    smooth = head.transform.smooth
    for i in _cuts(n, windows.tokens):
        for v in _cuts(vocab, windows.vocab):
            raw = _block(head, i, v, dtype)
            cols, rows = head.cols[:, v].to(dtype), head.rows[:, i].to(dtype)
            if want & {"max", "argmax"}:
                best, at = apply(head.transform, raw, cols, rows, decide=True).max(1)
                better = (best > top[i]) | (best.isnan() & ~top[i].isnan())
                if v.start == 0:
                    better.fill_(True)
                where[i] = torch.where(better, at + v.start, where[i])
                top[i] = torch.where(better, best, top[i])
            z = apply(smooth, raw, cols, rows)
            y = head.y[i] - v.start
            inside = (y >= 0) & (y < z.shape[1])
            picked[i] += torch.where(inside, z.gather(1, y.clamp(0, z.shape[1] - 1)), 0)
            if "sum" in want:
                weighted[i] += z @ head.u[v].to(dtype) if head.u.numel() else z.sum(1)
            old = ref[i].clone()
            new = torch.maximum(old, z.amax(1))
            ref[i] = new
            base = torch.where(new.isfinite(), new, 0)
            shift = torch.where(old.isfinite(), old, base) - base
            z = z - base[:, None]
            e = z.exp()
            fade = shift.exp()
            if "entropy" in want:
                moment[i] = fade * (moment[i] + shift * total[i]) + (e * z).sum(1)
            total[i] = fade * total[i] + e.sum(1)
    base = torch.where(ref.isfinite(), ref, 0)
    log_total = total.log()
    return RowStats(
        lse=base + log_total,
        picked=picked if "picked" in want else None,
        sum=weighted if "sum" in want else None,
        entropy=log_total - moment / total if "entropy" in want else None,
        max=top if "max" in want else None,
        argmax=where if "argmax" in want else None,
    )


def head_stats_backward(
    head: Head, upstream: RowGrads, stats: RowStats, needs: Needs, windows: Windows
) -> HeadGrads:
    n, vocab, dtype = len(head.h), len(head.w), stat_dtype(head.h.dtype)
    dh = torch.zeros_like(head.h, dtype=dtype, memory_format=torch.contiguous_format) if needs.h else None
    dw = head.w.new_zeros(head.w.shape, dtype=dtype) if needs.w else None
    dcols = torch.zeros_like(head.cols, dtype=dtype) if needs.cols else None
    drows = torch.zeros_like(head.rows, dtype=dtype) if needs.rows else None
    for i in _cuts(n, windows.tokens):
        for v in _cuts(vocab, windows.vocab):
            raw = _block(head, i, v, dtype)
            cols, rows = head.cols[:, v].to(dtype), head.rows[:, i].to(dtype)
            z, tape = record(head.transform, raw, cols, rows, needs.cols, needs.rows)
            logp = z - stats.lse[i, None]
            p = logp.exp()
            dz = torch.zeros_like(p)
            if upstream.lse is not None:
                dz += upstream.lse[i, None] * p
            if upstream.square is not None:
                dz += (2 * upstream.square * stats.lse)[i, None] * p
            if upstream.entropy is not None and stats.entropy is not None:
                dz -= upstream.entropy[i, None] * p * (logp + stats.entropy[i, None])
            if upstream.sum is not None:
                weight = head.u[v].to(dtype) if head.u.numel() else torch.ones_like(p[0])
                dz += upstream.sum[i, None] * weight
            if upstream.picked is not None:
                y = head.y[i] - v.start
                inside = (y >= 0) & (y < z.shape[1])
                dz.scatter_add_(1, y.clamp(0, z.shape[1] - 1), torch.where(inside, upstream.picked[i], 0))
            dz = pull_back(
                head.transform,
                dz,
                tape,
                cols,
                rows,
                None if dcols is None else dcols[:, v],
                None if drows is None else drows[:, i],
            )
            if dh is not None:
                dh[i] += dz @ head.w[v].to(dtype)
            if dw is not None:
                dw[v] += dz.t() @ head.h[i].to(dtype)
    return HeadGrads(
        None if dh is None else dh.to(head.h.dtype),
        None if dw is None else dw.to(head.w.dtype),
        None if dcols is None else dcols.to(head.cols.dtype),
        None if drows is None else drows.to(head.rows.dtype),
    )


def head_loss(
    head: Head, coefficients: RowGrads, needs: Needs, windows: Windows
) -> tuple[RowStats, HeadGrads]:
    want = {"lse", "picked"}
    want |= {"sum"} if coefficients.sum is not None else set()
    stats = head_stats(head, frozenset(want), windows)
    return stats, head_stats_backward(head, coefficients, stats, needs, windows)
