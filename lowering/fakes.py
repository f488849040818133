"""Shapes and dtypes of the ops' results, for tracing: no value is read and no size is compared.

A token count may be a symbol and stays one. It must not know about engines.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusedhead.kernels.contract import stat_dtype
from fusedhead.kernels.torch_engine.product_dtypes import product_dtype
from fusedhead.lowering.checks import asked
from fusedhead.lowering.retention import kept_rows


def _present(like: Tensor, given: bool, shape: tuple, dtype: torch.dtype) -> Tensor:
    return like.new_empty(shape if given else (0,), dtype=dtype)


def head_stats(
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
    want, wide, n = asked(stats), stat_dtype(h.dtype), h.shape[0]
    return (
        _present(h, bool(want & {"lse", "entropy"}), (n,), wide),
        _present(h, "picked" in want, (n, y.shape[1]), wide),
        _present(h, "sum" in want, (n,), wide),
        _present(h, "entropy" in want, (n,), wide),
        _present(h, "max" in want, (n,), wide),
        _present(h, "argmax" in want, (n,), torch.int64),
        _present(h, bool(want & {"lse", "entropy"}), (n,), wide),
        _present(h, "spread" in want, (n,), wide),
        kept_product(h, w, whole_below, keep),
    )


def kept_product(h: Tensor, w: Tensor, whole_below: int, keep: bool) -> Tensor:
    """Room for h wᵀ [N, V], as much as a call keeps of it."""
    dtype, vocab = product_dtype(h.dtype, h.device.type), w.shape[0]
    shape = (kept_rows(h.shape[0], vocab, whole_below), vocab) if keep else (0,)
    return h.new_empty(shape, dtype=dtype)


def _gradients(operands: tuple[Tensor, ...], needs: tuple[bool, ...]) -> tuple[Tensor, ...]:
    return tuple(_present(x, need, tuple(x.shape), x.dtype) for x, need in zip(operands, needs))


def head_stats_backward(*args: object) -> tuple[Tensor, ...]:
    h, w, _, cols, rows = args[4:9]
    return _gradients((h, w, cols, rows), args[15:19])  # type: ignore[arg-type]


def head_loss(*args: object) -> tuple[Tensor, ...]:
    h, w, y, cols, rows, u = args[:6]
    transform, stats, memory = args[10:13]
    rowwise = head_stats(h, w, y, cols, rows, u, transform, f"lse,{stats}", memory)  # type: ignore[arg-type]
    gradients = _gradients((h, w, cols, rows), args[13:17])  # type: ignore[arg-type]
    tie = _present(h, True, (), rowwise[0].dtype)  # type: ignore[arg-type]
    return (*rowwise[:3], *gradients, tie, *rowwise[6:8])
