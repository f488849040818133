"""Fake kernels: shapes and dtypes of the ops' results, for tracing. No value is read and no size is compared.

A symbolic number of tokens stays symbolic.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedhead.kernels.contract import (
    DIFFERENTIABLE_STATS,
    LOSS_OUTPUTS,
    SAVED_STATS,
    STATISTICS,
    Statistic,
    stat_dtype,
    with_companions,
)
from fusedhead.kernels.torch_engine.product_dtypes import product_dtype
from fusedhead.lowering.checks import parse_stats
from fusedhead.lowering.retention import kept_rows


def _empty_if_absent(like: Tensor, present: bool, shape: tuple, dtype: torch.dtype) -> Tensor:
    return like.new_empty(shape if present else (0,), dtype=dtype)


def fake_head_stats(
    h: Tensor,
    w: Tensor,
    y: Tensor,
    cols: Tensor,
    rows: Tensor,
    u: Tensor,
    transform: str,
    stats: str,
    memory: int,
    whole_below: int = 0,
    keep: bool = False,
) -> tuple[Tensor, ...]:
    want = with_companions(parse_stats(stats))
    return (*(_statistic(s, h, y, want) for s in STATISTICS), kept_product(h, w, whole_below, keep))


def _statistic(statistic: Statistic, h: Tensor, y: Tensor, want: frozenset[str]) -> Tensor:
    """A result [N] or [N, K], empty unless it is wanted."""
    shape = (h.shape[0], y.shape[1]) if statistic.per_label else (h.shape[0],)
    return _empty_if_absent(h, statistic.name in want, shape, statistic.dtype or stat_dtype(h.dtype))


def kept_product(h: Tensor, w: Tensor, whole_below: int, keep: bool) -> Tensor:
    """An empty tensor for the rows of h wᵀ [N, V] that a call keeps."""
    dtype, vocab = product_dtype(h.dtype, h.device.type), w.shape[0]
    shape = (kept_rows(h.shape[0], vocab, whole_below), vocab) if keep else (0,)
    return h.new_empty(shape, dtype=dtype)


def _gradients(operands: tuple[Tensor, ...], needs: tuple[bool, ...]) -> tuple[Tensor, ...]:
    return tuple(_empty_if_absent(x, need, tuple(x.shape), x.dtype) for x, need in zip(operands, needs))


def fake_head_stats_backward(*args: Any) -> tuple[Tensor, ...]:
    count = len(DIFFERENTIABLE_STATS)
    h, w, _, cols, rows, _ = args[count : count + 6]
    first = count + 6 + len(SAVED_STATS) + 2
    return _gradients((h, w, cols, rows), args[first : first + 4])


def fake_head_loss(*args: Any) -> tuple[Tensor, ...]:
    h, w, y, cols, rows = args[:5]
    want = with_companions(parse_stats(f"lse,{args[11]}"))
    results = {s.name: _statistic(s, h, y, want) for s in STATISTICS if s.name in LOSS_OUTPUTS}
    results |= zip(("dh", "dw", "dcols", "drows"), _gradients((h, w, cols, rows), args[13:17]))
    results["tie"] = _empty_if_absent(h, True, (), results["lse"].dtype)
    return tuple(results[name] for name in LOSS_OUTPUTS)
