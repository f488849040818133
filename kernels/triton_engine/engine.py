"""The Triton engine: the three functions of `contract`, made of Triton sweeps and cuBLAS GEMMs of 2NDV FLOP each.

    head_stats            stream, merge                                                    1 GEMM
    head_loss             per window of tokens: exponentials, then dw += Eᵀ sh, dh = E w   3 GEMMs
                          (4 for the columns whose exponentials the window has no room for)
    head_stats_backward   per window: dlogits, then dw, dh                                 4 GEMMs with the forward

Operands are float32, float16 or bfloat16. Never in memory: more of [N, V] than one window. The other buffers above a
few MiB are dh, dw, one float32 [window tokens, D] and, where the plan asks for it, half of dw in float32. The host
never waits for a value, so that CUDA graphs can capture every call. Sums have a fixed order, so that results are
deterministic.

Speed against bare cuBLAS GEMMs in bfloat16 on an H100 (benchmarks/results/gpu_times.txt, for head_stats
gpu_windows.txt; clocks move these by 3 %):

    tokens, D, V            head_stats / 1 GEMM   head_loss / 3   frozen w / 2   recompute / 4
    8192, 4096, 128256            1.00                1.02            1.03            0.98
    8192, 2304, 256000            1.00                0.99            0.97            0.97
    8192, 1024, 151936            1.05                0.96            0.95            0.97
    16384, 768, 50304             1.07                0.94            0.92            0.96
    2048, 4096, 32000             0.95                0.98            0.92            0.99
    512, 4096, 128256             0.99                0.99            0.90            0.97
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusedhead.kernels.contract import (
    STATISTICS,
    Head,
    HeadGrads,
    LogitGrads,
    Needs,
    OtherColumns,
    RowGrads,
    RowStats,
    Windows,
    logit_grads,
    with_companions,
)
from fusedhead.kernels.narrow_sum import NarrowSum
from fusedhead.kernels.triton_engine import single_pass
from fusedhead.kernels.triton_engine.float8 import single_pass as float8_pass
from fusedhead.kernels.triton_engine.launch.launch import on_device
from fusedhead.kernels.triton_engine.launch.sweep import multiplied_by_cublas, sweep
from fusedhead.kernels.triton_engine.recompute import rebuild
from fusedhead.kernels.triton_engine.rows.label_map import check_labels
from fusedhead.kernels.triton_engine.rows.merge import merge_statistics
from fusedhead.kernels.triton_engine.sweeps.statistics import launches, stream
from fusedhead.kernels.triton_engine.weight_gradient import WeightGradient
from fusedhead.kernels.triton_engine.windows import (
    even_cuts,
    multiplied,
    new_window,
    ready_head,
    ready_rows,
    rows_of,
    slice_head,
)


def head_stats(head: Head, want: frozenset[str], windows: Windows) -> RowStats:
    """Row statistics in one sweep, in several launches if it is long. A window exists only if cuBLAS multiplies."""
    head = ready_head(head)
    n, vocab = len(head.h), len(head.w)
    with on_device(head.h):
        check_labels(head.y, vocab)
        picked = head.h.new_empty(head.y.shape, dtype=torch.float32) if "picked" in want else None
        if n == 0:
            return _of_no_row(head, want)._replace(picked=picked)
        buffer = None
        if multiplied_by_cublas(head):
            cuts = list(even_cuts(n, windows.tokens * windows.vocab // vocab))  # whole rows that fill one window
            buffer = new_window(head, cuts[0].stop, vocab)
        else:
            cuts = launches(head, want)
        whole = slice(0, vocab)
        found = []
        for i in cuts:
            part = slice_head(head, i, whole)
            logits = None if buffer is None else multiplied(part, buffer[: len(part.h)])
            found.append(_statistics(part, want, None if picked is None else rows_of(picked, i), logits))
        rows = found[0] if len(found) == 1 else {name: torch.cat([f[name] for f in found]) for name in found[0]}
        return RowStats(picked=picked, **rows)


def _of_no_row(head: Head, want: frozenset[str]) -> RowStats:
    names = with_companions(want | {"lse"})
    dtypes = {s.name: s.dtype or torch.float32 for s in STATISTICS if s.name in names and not s.per_label}
    empty = {name: head.h.new_empty(0, dtype=dtype) for name, dtype in dtypes.items()}
    return RowStats(**empty)


def _statistics(head: Head, want: frozenset[str], picked: Tensor | None, logits: Tensor | None) -> dict[str, Tensor]:
    s = sweep("stream", head, want, logits=logits)
    part, part_top = stream(s, head, want, picked if head.y.shape[1] else None, logits=logits)
    return merge_statistics(s, part, part_top, want)


def head_stats_backward(head: Head, upstream: RowGrads, stats: RowStats, needs: Needs, windows: Windows) -> HeadGrads:
    """The gradients from dz, which is computed again window by window."""
    head = ready_head(head)
    n, vocab = len(head.h), len(head.w)
    if not head.y.shape[1]:
        upstream = upstream._replace(picked=None)
    grads = logit_grads(ready_rows(upstream), stats)
    token_cuts, vocab_cuts = list(even_cuts(n, windows.tokens)), list(even_cuts(vocab, windows.vocab))
    dh = head.h.new_empty(head.h.shape, dtype=windows.dh_dtype(head)) if needs.h else None
    dcols = torch.zeros_like(head.cols) if needs.cols else None
    drows = torch.zeros_like(head.rows) if needs.rows else None
    if n == 0:
        return HeadGrads(dh, head.w.new_zeros(head.w.shape) if needs.w else None, dcols, drows)
    dw = WeightGradient(head.w, len(token_cuts), windows.accumulate) if needs.w else None
    with on_device(head.h):
        buffer = new_window(head, token_cuts[0].stop, vocab_cuts[0].stop)
        # several windows of columns are summed in float32: a sum in two bytes would round more than eager code does
        accumulate = torch.float32 if len(vocab_cuts) > 1 else windows.dh_dtype(head)
        for i in token_cuts:
            rebuild(
                head,
                i,
                vocab_cuts,
                buffer,
                LogitGrads._make(None if g is None else rows_of(g, i) for g in grads),
                RowStats._make(None if x is None else x[i] for x in stats),
                dw,
                None if dh is None else NarrowSum(rows_of(dh, i), accumulate),  # freed when the window is done
                dcols,
                drows,
            )
    return HeadGrads(dh, None if dw is None else dw.finish(), dcols, drows)


def _two_sweeps(head: Head, c: RowGrads, needs: Needs, windows: Windows) -> tuple[RowStats, HeadGrads]:
    want = {"lse"} | ({"picked"} if head.y.shape[1] else set()) | ({"sum", "spread"} if c.sum is not None else set())
    stats = head_stats(head, frozenset(want), windows)
    if stats.picked is None:
        stats = stats._replace(picked=head.h.new_empty(head.y.shape, dtype=torch.float32))
    if not any(needs):
        return stats, HeadGrads(None, None, None, None)
    return stats, head_stats_backward(head, c, stats, needs, windows)


def head_loss(
    head: Head,
    coefficients: RowGrads,
    needs: Needs,
    windows: Windows,
    other_columns: OtherColumns | None = None,
) -> tuple[RowStats, HeadGrads]:
    """Statistics and gradients: in one sweep where `single_pass` or `float8` can, else in two."""
    head = ready_head(head)
    if other_columns is not None:
        return single_pass.one_pass(head, coefficients, needs, windows, other_columns)
    if windows.tail_rows:
        return float8_pass.one_float8_pass(head, coefficients, windows)
    if single_pass.can_single_pass(head, coefficients, needs, windows):
        return single_pass.one_pass(head, coefficients, needs, windows)
    return _two_sweeps(head, coefficients, needs, windows)
