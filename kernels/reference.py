"""A head's statistics in plain torch with the whole [N, V] logits in memory, by their definitions.

Tests call it in float64 and take the result as the truth; gradients come from autograd.
"""

from __future__ import annotations

from fusedhead.kernels.contract import STATISTICS, Head, RowStats, WholeLogits
from fusedhead.kernels.transform.transform import apply


def row_stats(head: Head) -> RowStats:
    """Every statistic of z = transform(h @ w.T), in the dtype of ``head.h``.

    h [N, D], w [V, D], y [N, K], u [V] or [0] -> picked [N, K] and the others [N].
    """
    h, w, y, cols, rows, u, transform = head
    raw = h @ w.T
    z = apply(transform.smooth, raw, cols, rows)
    decided = apply(transform, raw, cols, rows, decide=True)
    logits = WholeLogits(z, decided, z - z.logsumexp(1, keepdim=True), y, u)
    return RowStats(**{statistic.name: statistic.of(logits) for statistic in STATISTICS})
