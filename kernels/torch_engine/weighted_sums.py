"""The statistic Σ_v u_v z[i, v] of a z that is h wᵀ times a constant: a product with one vector, no sweep
over z.

Σ_v u_v (h_i · w_v) = h_i · (uᵀ w), and its gradients are rank one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusedhead.kernels.contract import Head, stat_dtype
from fusedhead.kernels.torch_engine.blocks import GATHER_BYTES, cuts, row_dtype


def weighted_columns(head: Head, wide: torch.dtype) -> Tensor:
    """uᵀ w in ``wide``: [D]."""
    total = head.w.new_zeros(head.w.shape[1], dtype=wide)
    for v in cuts(head.w.shape[0], GATHER_BYTES // max(1, wide.itemsize * head.w.shape[1])):
        w = head.w[v].to(wide)
        total += w.t() @ head.u[v].to(wide) if head.u.numel() else w.sum(0)
    return total


def weighted_hidden(head: Head, g: Tensor) -> Tensor:
    """gᵀ h for g [N]: [D]."""
    total = head.h.new_zeros(head.h.shape[1], dtype=g.dtype)
    for i in cuts(head.h.shape[0], GATHER_BYTES // max(1, 4 * head.h.shape[1])):
        total += head.h[i].to(g.dtype).t() @ g[i]
    return total


def weighted_sums(head: Head, scale: float) -> Tensor:
    """scale Σ_v u_v (h_i · w_v): [N] in `row_dtype`."""
    total = weighted_columns(head, row_dtype(head.h.device.type)) * scale
    out = head.h.new_empty(head.h.shape[0], dtype=total.dtype)
    for i in cuts(head.h.shape[0], GATHER_BYTES // max(1, total.element_size() * head.h.shape[1])):
        out[i] = head.h[i].to(total.dtype) @ total
    return out


def spread_from_sums(head: Head, lse: Tensor, total: Tensor) -> Tensor:
    """Σ_v u_v (lse - z) from the lse [N] and the sums [N], as precise as they are: [N] in the statistics' dtype."""
    weight = head.u.to(total.dtype).sum() if head.u.numel() else len(head.w)
    return (lse.to(total.dtype) * weight - total).to(stat_dtype(head.h.dtype))
