"""The definition of a head's statistics, in plain torch with the whole [N, V] logits in memory.

Tests call it in float64 and take the result as the truth; gradients come from autograd. It is deliberately
too simple to be wrong, so it must not know about windows, engines, dtypes of accumulation or speed.
"""

from __future__ import annotations

from fusedhead.kernels.contract import Head, RowStats
from fusedhead.kernels.transform.transform import apply


def row_stats(head: Head) -> RowStats:
    """Every statistic of z = transform(h @ w.T), in the dtype of ``head.h``.

    h [N, D], w [V, D], y [N, K], u [V] or [0] -> lse, sum, entropy, max, argmax [N] and picked [N, K].
    A column with z = -inf makes the entropy NaN, as ``-(p * p.log()).sum(-1)`` does in a user's program.
    """
    h, w, y, cols, rows, u, transform = head
    raw = h @ w.T
    z = apply(transform.smooth, raw, cols, rows)
    decided = apply(transform, raw, cols, rows, decide=True)
    logp = z - z.logsumexp(1, keepdim=True)
    top = decided.max(1) if z.numel() else (z.new_empty(len(z)), y.new_empty(len(z)))
    return RowStats(
        lse=z.logsumexp(1),
        picked=z.gather(1, y),
        sum=z @ u if u.numel() else z.sum(1),
        entropy=-(logp.exp() * logp).sum(1),
        max=top[0],
        argmax=top[1],
        lse_low=z.new_zeros(len(z)),
        spread=-(logp @ u if u.numel() else logp.sum(1)),
    )
