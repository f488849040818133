"""The CUDA engine: the three functions of `contract` out of Triton sweeps and cuBLAS GEMMs.

    head_stats            stream, merge                                                  1 GEMM
    head_loss             per window of tokens: exponentials, then dw += Eᵀ sh, dh = E w   3 GEMMs
                          (4 for the columns whose exponentials there is no room for)
    head_stats_backward   per window: dlogits, then dw, dh                           4 GEMMs with the forward

float32, float16 and bfloat16. Nothing of size [N, V] exists beyond one window; the only other buffers above a
few MiB are dh, dw, one float32 [window tokens, D] and, where asked, half of dw in float32. No step depends on a
value (no host sync, CUDA graphs), sums have a fixed order (deterministic). It must not know how large the
windows should be (`fusedhead.lowering.plan` decides) nor what graph asked.

Speed against bare cuBLAS GEMMs in bfloat16 on an H100 (benchmarks/gpu_times.py; clocks move these by 3 %):

    tokens, D, V            head_stats / 1 GEMM   head_loss / 3   frozen w / 2   recompute / 4
    8192, 4096, 128256            0.96                1.02            1.03            0.98
    8192, 2304, 256000            0.97                0.99            0.97            0.97
    8192, 1024, 151936            1.00                0.96            0.95            0.97
    16384, 768, 50304             0.94                0.94            0.92            0.96
    2048, 4096, 32000             0.94                0.98            0.92            0.99
    512, 4096, 128256             0.99                0.99            0.90            0.97
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fusedhead.kernels.contract import Head, HeadGrads, Needs, RowGrads, RowStats, Windows
from fusedhead.kernels.triton_dlogits import dlogits
from fusedhead.kernels.triton_exp import exponentials
from fusedhead.kernels.triton_finalize import finalize, mark_unsafe, scale_rows
from fusedhead.kernels.triton_gemm import gemm, weighted_rows
from fusedhead.kernels.triton_labels import check_labels, map_labels
from fusedhead.kernels.triton_launch import on_device
from fusedhead.kernels.triton_merge import merge_reference, merge_statistics
from fusedhead.kernels.triton_reference import reference
from fusedhead.kernels.triton_stream import stream
from fusedhead.kernels.triton_sweep import Sweep, multiplied_by_cublas, sweep
from fusedhead.kernels.triton_transform import varies_along_row
from fusedhead.kernels.triton_weight_gradient import WeightGradient

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PARTLY = (torch.bfloat16,)  # of which part of the exponentials may be kept: those that sweep once for all of them
FEW = 16  # up to this many tokens, dz is rounded once (two sweeps): sums too short to average roundings out
ALIGNED = 64  # windows start at, and rows of a window are padded to, a multiple of this many elements
FLOAT16_SHIFT = 10  # float16 exponentials are scaled by 2^10: small ones keep digits, targets up to 2^4 fit


def _cuts(total: int, size: int) -> Iterator[slice]:
    """Equal windows of at most ``size``, on aligned boundaries when there is room for that."""
    size = max(size, 1)
    count = max(-(-total // size), 1)
    even = max(min(-(-total // (128 * count)) * 128, size), 1)
    return (slice(at, min(at + even, total)) for at in range(0, total, even))


def _slice(head: Head, i: slice, v: slice) -> Head:
    """The head of one window. Labels keep counting from the whole vocabulary's first column."""
    if i.start == v.start == 0 and i.stop == len(head.h) and v.stop == len(head.w):
        return head
    cols = head.cols[:, v] if head.cols.numel() else head.cols
    rows = head.rows[:, i] if head.rows.numel() else head.rows
    return Head(head.h[i], head.w[v], head.y[i], cols, rows, head.u[v] if head.u.numel() else head.u, head.transform)


def _slice_rows(grads: RowGrads, i: slice) -> RowGrads:
    return RowGrads(*(None if g is None else g[i] for g in grads))


def _ready_rows(grads: RowGrads) -> RowGrads:
    """Contiguous float32 vectors, as kernels read them."""
    return RowGrads(*(None if g is None else g.to(torch.float32).contiguous() for g in grads))


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.numel() == 0 or (x.stride(-1) == 1 and x.dtype == torch.float32) else x.float().contiguous()


def _ready(head: Head) -> Head:
    """float32 vectors with unit inner stride, as kernels read them; h and w are taken as they lie.

    Raises ValueError where operands lie on different devices: a launch would find that out only the first time.
    """
    device = head.h.device
    for name, x in (("w", head.w), ("labels", head.y), ("cols", head.cols), ("rows", head.rows), ("u", head.u)):
        if x.device != device and x.numel():
            raise ValueError(f"h is on {device} and {name} on {x.device}; all operands must be on one device")
    return head._replace(cols=_unit_stride(head.cols), rows=_unit_stride(head.rows), u=_unit_stride(head.u))


def _window(head: Head, tokens: int, vocab: int) -> Tensor:
    """Room for a window of logits, rows padded so that TMA and cuBLAS find them aligned."""
    return head.h.new_empty((tokens, -(-vocab // ALIGNED) * ALIGNED))


def head_stats(head: Head, want: frozenset[str], windows: Windows) -> RowStats:
    """One sweep. Keeps a window only where cuBLAS multiplies."""
    head = _ready(head)
    n, vocab = len(head.h), len(head.w)
    with on_device(head.h):
        check_labels(head.y, vocab)
        picked = head.h.new_empty(head.y.shape, dtype=torch.float32) if "picked" in want else None
        if n == 0:
            empty = {k: head.h.new_empty(0, dtype=torch.float32) for k in want - {"picked", "argmax"}}
            argmax = head.y.new_empty(0) if "argmax" in want else None
            return RowStats(**({"lse": head.h.new_empty(0, dtype=torch.float32)} | empty), picked=picked, argmax=argmax)
        if not multiplied_by_cublas(head):
            return RowStats(picked=picked, **_statistics(head, want, picked, None))
        cuts = list(_cuts(n, windows.tokens * windows.vocab // vocab))  # whole rows in the room of a window
        buffer, whole = _window(head, cuts[0].stop, vocab), slice(0, vocab)
        found = []
        for i in cuts:
            part = _slice(head, i, whole)
            logits = _multiplied(part, buffer[: len(part.h)])
            found.append(_statistics(part, want, None if picked is None else picked[i], logits))
        return RowStats(picked=picked, **{name: torch.cat([f[name] for f in found]) for name in found[0]})


def _statistics(head: Head, want: frozenset[str], picked: Tensor | None, logits: Tensor | None) -> dict[str, Tensor]:
    s = sweep("stream", head, want, logits=logits)
    part, part_top = stream(s, head, want, picked if head.y.shape[1] else None, logits=logits)
    return merge_statistics(s, part, part_top, want)


def _add_vectors(
    head: Head, parts: tuple[Tensor, Tensor], dcols: Tensor | None, drows: Tensor | None, i: slice, v: slice
) -> None:
    for j, (op, value) in enumerate(head.transform.smooth.steps):
        if dcols is not None and op in ("addcol", "mulcol"):
            dcols[int(value), v] += parts[0][j].sum(0)
        if drows is not None and op in ("addrow", "mulrow"):
            drows[int(value), i] += parts[1][j].sum(0)


def head_stats_backward(head: Head, upstream: RowGrads, stats: RowStats, needs: Needs, windows: Windows) -> HeadGrads:
    """Rebuilds dz window by window. dw needs no summing when a window holds all tokens."""
    head = _ready(head)
    n, vocab = len(head.h), len(head.w)
    if upstream.square is not None:
        slope = 2 * upstream.square * stats.lse
        upstream = upstream._replace(lse=slope if upstream.lse is None else upstream.lse + slope, square=None)
    if not head.y.shape[1]:
        upstream = upstream._replace(picked=None)
    upstream = _ready_rows(upstream)
    token_cuts, vocab_cuts = list(_cuts(n, windows.tokens)), list(_cuts(vocab, windows.vocab))
    dh = head.h.new_empty(head.h.shape) if needs.h else None
    dcols = torch.zeros_like(head.cols) if needs.cols else None
    drows = torch.zeros_like(head.rows) if needs.rows else None
    if n == 0:
        return HeadGrads(dh, head.w.new_zeros(head.w.shape) if needs.w else None, dcols, drows)
    dw = WeightGradient(head.w, len(token_cuts), windows.accumulate) if needs.w else None
    with on_device(head.h):
        buffer = _window(head, token_cuts[0].stop, vocab_cuts[0].stop)
        # always float32: a vocabulary is many windows, and a narrow sum over them loses to eager code
        wide = needs.h and len(vocab_cuts) > 1 and head.h.dtype != torch.float32
        shape = (token_cuts[0].stop, head.h.shape[1])
        dh_sum = head.h.new_empty(shape, dtype=torch.float32) if wide else None
        for i in token_cuts:
            rows = RowStats._make(None if x is None else x[i] for x in stats)
            grads = _slice_rows(upstream, i)
            for v in vocab_cuts:
                part = _slice(head, i, v)
                window = buffer[: len(part.h)]
                logits = _multiplied(part, window)
                s = sweep("dlogits", part, logits=logits)
                sums = dlogits(s, part, window, grads, rows, v.start, needs.cols, needs.rows)
                _add_vectors(part, sums, dcols, drows, i, v)
                window = window[:, : len(part.w)]
                if dw is not None:
                    dw.add(window, v, part.h, first=i.start == 0)
                if dh is not None:
                    to = dh[i] if dh_sum is None else dh_sum[: len(part.h)]
                    gemm(window, part.w, to, add=v.start > 0)
            if dh is not None and dh_sum is not None:
                dh[i] = dh_sum[: i.stop - i.start]
    return HeadGrads(dh, None if dw is None else dw.finish(), dcols, drows)


def _fits_one_pass(head: Head, c: RowGrads, needs: Needs, windows: Windows) -> bool:
    """Whether gradients are a row scale away from exponentials, and the planner allows whole rows of them.

    Of bfloat16 rows it may allow a part: the rest is swept for its lse, and rebuilt for the gradients.
    """
    part = head.h.dtype in PARTLY and c.sum is None
    return (
        (needs.h or needs.w)
        and not (needs.cols or needs.rows)
        and (c.lse is not None or c.square is not None)
        and (c.sum is None or not head.transform.bounded_slope)
        and (part or windows.vocab >= len(head.w))
        and len(head.h) > FEW
    )


def _two_sweeps(head: Head, c: RowGrads, needs: Needs, windows: Windows) -> tuple[RowStats, HeadGrads]:
    want = {"lse"} | ({"picked"} if head.y.shape[1] else set()) | ({"sum"} if c.sum is not None else set())
    stats = head_stats(head, frozenset(want), windows)
    if stats.picked is None:
        stats = stats._replace(picked=head.h.new_empty(head.y.shape, dtype=torch.float32))
    if not any(needs):
        return stats, HeadGrads(None, None, None, None)
    return stats, head_stats_backward(head, c, stats, needs, windows)


def _sum_terms(head: Head, c: Tensor) -> tuple[Tensor, Tensor]:
    """(r [N], f [V]) with d(Σ_i c_i Σ_v u_v z_iv)/dz_raw = r ⊗ f, for a transform whose slope factorises."""
    r, f = c, head.u if head.u.numel() else head.h.new_ones(len(head.w), dtype=torch.float32)
    for op, value in head.transform.steps:
        if op == "mul":
            r = r * float(value)
        elif op == "mulrow":
            r = r * head.rows[int(value)]
        elif op == "mulcol":
            f = f * head.cols[int(value)]
    return r, f


def head_loss(head: Head, coefficients: RowGrads, needs: Needs, windows: Windows) -> tuple[RowStats, HeadGrads]:
    """Statistics and gradients in one sweep where that is possible (`_fits_one_pass`), else in two."""
    head = _ready(head)
    if not _fits_one_pass(head, coefficients, needs, windows):
        return _two_sweeps(head, coefficients, needs, windows)
    coefficients = _ready_rows(coefficients)
    n, (vocab, hidden), narrow = len(head.h), head.w.shape, head.h.dtype
    new = head.h.new_empty
    kept = slice(0, min(windows.vocab, vocab))
    others = [slice(kept.stop + v.start, kept.stop + v.stop) for v in _cuts(vocab - kept.stop, windows.vocab)]
    lse, picked = new(n, dtype=torch.float32), new(head.y.shape, dtype=torch.float32)
    total = None if coefficients.sum is None else torch.empty_like(lse)
    cuts = list(_cuts(n, windows.tokens))
    tokens = cuts[0].stop
    with on_device(head.h):
        check_labels(head.y, vocab)
        dh = new((n, hidden)) if needs.h else None
        dw = WeightGradient(head.w, len(cuts), windows.accumulate) if needs.w else None
        rank_one = None
        if coefficients.sum is not None:
            r, f = _sum_terms(head, coefficients.sum)
            if dw is not None:
                dw.start(f, weighted_rows(r, head.h))
            rank_one = (r, weighted_rows(f, head.w)) if dh is not None else None
        buffer = _window(head, tokens, kept.stop)
        ref2 = new(tokens, dtype=torch.float32)
        slope = torch.empty_like(picked[:tokens] if varies_along_row(head.transform) else picked[:0])
        scaled = new((tokens, hidden)) if dw is not None and dh is None else None
        wide = new((tokens, hidden), dtype=torch.float32) if dh is not None and narrow != torch.float32 else None
        gain = 2.0**FLOAT16_SHIFT if narrow == torch.float16 else 1.0
        for i in cuts:
            part, c = _slice(head, i, kept), _slice_rows(coefficients, i)
            m = len(part.h)
            whole, other_lse = part, None
            if others:  # a label past the kept columns may lie in their last tile
                whole = _slice(head, i, slice(0, vocab))
                part = part._replace(y=part.y.masked_fill(part.y >= kept.stop, -1))
                other_lse = _lse_of_others(head, i, kept.stop, picked[i])
            logits = _multiplied(part, buffer[:m])
            s = sweep("exp", part, logits=logits)
            totals = new((1 if total is None else 2, s.schedule.size), dtype=torch.float32)
            _exponentials(s, part, whole, buffer[:m], ref2[:m], picked[i], slope, totals, logits)
            # dh's own rows hold s ⊙ h until dw has used it
            sh = None if dw is None else dh[i] if dh is not None else scaled[:m] if scaled is not None else None
            rows = (ref2[:m], picked[i], slope, totals)
            row_total = None if total is None else total[i]
            scale = finalize(s, part, buffer[:m], *rows, c, lse[i], row_total, sh, gain, other_lse)
            window = buffer[:m, : kept.stop]
            if dw is not None and sh is not None:
                dw.add(window, kept, sh, first=i.start == 0, alpha=1 / gain)
            product = None if dh is None else dh[i] if wide is None else wide[:m]
            if product is not None:
                gemm(window, part.w, product)
            outer = None if rank_one is None else (rank_one[0][i], rank_one[1])
            if product is not None and dh is not None:
                scale_rows(product, scale, product if others else dh[i], outer)
            if others:
                _add_others(head, i, others, buffer[:m], c, lse[i], dw, product)
                if product is not None and dh is not None:
                    dh[i] = product
        del buffer, window
        grads = HeadGrads(dh, None if dw is None else dw.finish(), None, None)
    return RowStats(lse, picked, total), grads


def _lse_of_others(head: Head, i: slice, first: int, picked: Tensor) -> Tensor:
    """Base-2 lse [m] of the columns from ``first`` on; their labels are picked."""
    part = _slice(head, i, slice(first, len(head.w)))
    part = part._replace(y=part.y - first)
    s = sweep("stream", part)
    rows, _ = stream(s, part, frozenset({"lse"}), picked if part.y.shape[1] else None)
    out = rows.new_empty(len(part.h))
    merge_reference(s, rows, out, finite=False)
    return out


def _add_others(
    head: Head,
    i: slice,
    others: list[slice],
    buffer: Tensor,
    c: RowGrads,
    lse: Tensor,
    dw: WeightGradient | None,
    dh: Tensor | None,
) -> None:
    """Rebuild dz of the columns whose exponentials were not kept, block by block, and add their gradients."""
    grads = c
    if c.square is not None:
        slope = 2 * c.square * lse
        grads = c._replace(lse=slope if c.lse is None else c.lse + slope, square=None)
    for v in others:
        part = _slice(head, i, v)
        s = sweep("dlogits", part)
        dlogits(s, part, buffer, grads, RowStats(lse), v.start, False, False)
        window = buffer[:, : len(part.w)]
        if dw is not None:
            dw.add(window, v, part.h, first=i.start == 0)
        if dh is not None:
            gemm(window, part.w, dh, add=True)


def _multiplied(head: Head, window: Tensor) -> Tensor | None:
    """The window with h @ w.T in it, where cuBLAS is to multiply; a sweep then reads it and writes over it."""
    if not multiplied_by_cublas(head):
        return None
    gemm(head.h, head.w.t(), window[:, : len(head.w)])
    return window


def _exponentials(
    s: Sweep,
    part: Head,
    whole: Head,
    window: Tensor,
    ref2: Tensor,
    picked: Tensor,
    slope: Tensor,
    totals: Tensor,
    logits: Tensor | None,
) -> None:
    """window <- E with a reference that is safe for every row.

    bfloat16 and float32 start from the target logit and redo, on the device's own decision, the token blocks
    where it was too far from the maximum. float16 has no such range, and logits that lie in the window are gone
    after one sweep over them: these sweep twice, with the true lse as reference.
    """
    redo = sweep("stream", part, logits=logits)
    labels = map_labels(s, part.y) if s.labels else None
    lse_only = frozenset({"lse"})
    if window.dtype == torch.float16 or logits is not None:
        rows, _ = stream(redo, part, lse_only, None, logits=logits)
        merge_reference(redo, rows, ref2, -float(FLOAT16_SHIFT) if window.dtype == torch.float16 else 0.0)
        exponentials(s, part, window, ref2, picked, slope, totals, labels)
        return
    # the label may lie outside the part
    reference(redo if whole is part else sweep("stream", whole), whole, ref2)
    exponentials(s, part, window, ref2, picked, slope, totals, labels)
    flags = mark_unsafe(s, totals)
    rows, _ = stream(redo, part, lse_only, None, flags)
    merge_reference(redo, rows, ref2, 0.0, flags)
    exponentials(s, part, window, ref2, picked, slope, totals, labels, flags)
