"""The statistic Σ_v u_v z[i, v] of a z that is h wᵀ times a constant: a product with one vector, no sweep
over z.

Σ_v u_v (h_i · w_v) = h_i · (uᵀ w), and its gradients are rank one. Everything in the statistics' dtype.
"""

from __future__ import annotations

from torch import Tensor

from fusedhead.kernels.contract import Head, stat_dtype
from fusedhead.kernels.torch_blocks import GATHER_BYTES, cuts


def weighted_columns(head: Head) -> Tensor:
    """uᵀ w: [D]."""
    wide = stat_dtype(head.h.dtype)
    total = head.w.new_zeros(head.w.shape[1], dtype=wide)
    for v in cuts(head.w.shape[0], GATHER_BYTES // max(1, 4 * head.w.shape[1])):
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
    """scale Σ_v u_v (h_i · w_v): [N]."""
    total = weighted_columns(head) * scale
    out = head.h.new_empty(head.h.shape[0], dtype=total.dtype)
    for i in cuts(head.h.shape[0], GATHER_BYTES // max(1, 4 * head.h.shape[1])):
        out[i] = head.h[i].to(total.dtype) @ total
    return out
