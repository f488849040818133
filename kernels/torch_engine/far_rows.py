"""Rows so far from 0 that exp(z - level) must be taken of z itself: their logits whole, a few rows at once.

A level is a number of the statistics' dtype in base 2, so it misses z by half a unit of z's last place: from 2^26 on
that is a factor of e^4 in every exponential, from 2^31 on it leaves float32. Here z is computed once, less its own
maximum, as in eager code, and labels' logits are read out of it: everything is relative to the same rounded numbers.
FLOP 6 NDV; memory: two blocks of whole rows in the statistics' dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fusedhead.kernels.contract import Head, Needs, stat_dtype
from fusedhead.kernels.torch_engine.blocks import (
    BLOCK_BYTES,
    block_vectors,
    cuts,
    first_of_equal,
    row_dtype,
    two_sum_error,
)
from fusedhead.kernels.torch_engine.exponentials import label_terms
from fusedhead.kernels.torch_engine.gradient_sink import Sink, accumulate_product
from fusedhead.kernels.torch_engine.product_dtypes import product_dtype
from fusedhead.kernels.transform.backward import apply_and_record, pull_back

FAR_FROM_ZERO = 2.0**26
# of tokens, their lse, total, others, first and slope: s [m] and t [m, K] of `softmax_gradients`
Factors = Callable[[slice, Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class SweptRows(NamedTuple):
    """Results of a sweep for all rows, in `row_dtype`. The lse is the sum of two numbers."""

    lse: Tensor  # [N]
    low: Tensor  # [N] the rounding error of max + log Σ exp(z - max), not zero for a maximum beyond 2^53
    picked: Tensor  # [N, K] logits of the labels


def far(level: Tensor) -> bool:
    """Whether one of the levels is too far from 0 to be subtracted. The host waits for the answer."""
    return bool((level.abs() > FAR_FROM_ZERO).any())


def sweep_far_rows(
    head: Head, i: slice, factors: Factors, needs: Needs, columns: int, rows: SweptRows, sink: Sink
) -> None:
    """Write ``rows`` of the tokens i, and add their gradients to ``sink``."""
    wide = stat_dtype(head.h.dtype)
    few = max(1, BLOCK_BYTES // max(1, len(head.w) * wide.itemsize))
    for start in range(i.start, i.stop, few):
        _few_rows(head, slice(start, min(start + few, i.stop)), factors, needs, columns, rows, sink)


def _few_rows(head: Head, j: slice, factors: Factors, needs: Needs, columns: int, swept: SweptRows, sink: Sink) -> None:
    wide, fine = stat_dtype(head.h.dtype), row_dtype(head.h.device.type)
    work, scale = product_dtype(head.h.dtype, head.h.device.type), head.transform.plain_scale
    h, blocks = head.h[j].to(wide), list(cuts(len(head.w), columns))
    raw = h.new_empty(len(h), len(head.w))
    z = torch.empty_like(raw)
    for v in blocks:
        raw[:, v] = h @ head.w[v].to(wide).t()
        z[:, v], _ = apply_and_record(head.transform, raw[:, v].clone(), *block_vectors(head, j, v), False, False)
    most = z.amax(1)
    most = torch.where(most.isfinite(), most, 0)
    swept.picked[j] = labelled = z.gather(1, head.y[j])
    first = first_of_equal(head.y[j])
    e_labels = torch.exp(labelled - most[:, None]).to(fine) * first
    e = z.sub_(most[:, None]).exp_().scatter_(1, head.y[j], 0)
    rest, of_labels = e.sum(1, dtype=fine), e_labels.sum(1)
    total, without_label = rest + of_labels, rest[:, None] + (of_labels[:, None] - e_labels)
    log_total = total.log()
    swept.lse[j] = at = most.to(fine) + log_total
    swept.low[j] = two_sum_error(at, most.to(fine), log_total)
    if not (needs.h or needs.w or needs.cols):
        return
    s, t = factors(j, at, total, without_label, first, label_terms(head, j)[1])
    e.div_(total[:, None])  # or the sum of what is multiplied by a large weight leaves the dtype
    s, t = (s * total).to(wide), t.to(wide)
    product = h.new_zeros((len(h), head.h.shape[1] if needs.h else 0))
    hs = (h * s[:, None]).to(work)
    for v in blocks:
        x = e[:, v]
        if scale is None:
            cols, rows = block_vectors(head, j, v)
            _, tape = apply_and_record(head.transform, raw[:, v].clone(), cols, rows, False, False)
            x = pull_back(head.transform, x.clone(), tape, cols, rows, None, None)
        if needs.h:
            accumulate_product(product, x, head.w[v].to(wide))
        sink.block(j, v, x.to(work), hs, s)
    sink.hidden(j, product, s, t)
    sink.labels(j, t)
