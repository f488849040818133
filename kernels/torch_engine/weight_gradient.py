"""The gradient of the weight during a sweep: the sum over windows of tokens, in a chosen precision.

dw = Σ_windows Eᵀ (s h) + Σ_labels t h: the first term comes out of matrix products block by block, the
second is kept out of them and added in float32, so that a probability near 1 costs no precision. If the sum
is kept in a narrower dtype than float32, labels are added once at the end, when each row is rounded anyway.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusedhead.kernels.contract import Head, stat_dtype
from fusedhead.kernels.torch_engine.blocks import GATHER_BYTES, cuts


class BlockWeightGradient:
    """dw [V, D], contiguous. Every element is written, also by a sweep of no windows."""

    def __init__(self, head: Head, accumulate: torch.dtype) -> None:
        n, k = head.y.shape
        self.head = head
        self.wide = stat_dtype(head.h.dtype)
        self.sum = torch.empty(
            head.w.shape, dtype=accumulate if accumulate == head.w.dtype else self.wide, device=head.w.device
        )
        self.started = False
        late = self.sum.dtype != self.wide
        self.terms = head.h.new_zeros((n, k), dtype=self.wide) if late else None

    def begin_with(self, u: Tensor, q: Tensor) -> None:
        """Start from the rank-one u [V] ⊗ q [D] instead of zero."""
        for v in cuts(len(u), GATHER_BYTES // max(1, 4 * len(q))):
            self.sum[v] = u[v].to(self.wide)[:, None] * q
        self.started = True

    def begin_with_nothing(self) -> None:
        """Start from zero. For a sweep that may add no block, whose dw is zero then."""
        if not self.started:
            self.sum.zero_()
            self.started = True

    def add_block(self, v: slice, first: bool, e: Tensor, h: Tensor) -> None:
        """dw[v] += eᵀ h for e [m, v] and h [m, D]; ``first`` says that nothing was added to these rows
        before.
        """
        into, fresh = self.sum[v], first and not self.started
        if into.dtype == e.dtype:
            torch.mm(e.t(), h, out=into) if fresh else into.addmm_(e.t(), h)
        elif e.dtype == self.wide:  # `add_` of two dtypes would hold this three times
            into.copy_(e.t() @ h if fresh else into.to(self.wide).addmm_(e.t(), h))
        elif fresh:
            into.copy_(e.t() @ h)
        else:
            into.add_(e.t() @ h)

    def add_labels(self, i: slice, t: Tensor) -> None:
        """dw[y_ik] += t_ik h_i over the window i, t [m, K] wide."""
        if self.terms is not None:
            self.terms[i] = t
            return
        h = self.head.h[i]
        for k in range(t.shape[1]):
            for at in cuts(len(t), GATHER_BYTES // max(1, 4 * h.shape[1])):
                self.sum.index_add_(0, self.head.y[i][at, k], h[at].to(self.wide) * t[at, k, None])

    def _add_late(self, terms: Tensor) -> None:
        """Add all labels together, grouped by class, so that every row of dw is rounded only once more."""
        labels, place = self.head.y.reshape(-1).unique(return_inverse=True)
        terms, tokens = terms.reshape(-1), terms.shape[1]
        step = max(1, GATHER_BYTES // max(1, 4 * self.sum.shape[1]))
        order = place.argsort(stable=True)
        ends = torch.bincount(place, minlength=len(labels)).cumsum(0).tolist()
        for r in cuts(len(labels), step):
            rows = self.sum[labels[r]].to(self.wide)
            members = order[ends[r.start - 1] if r.start else 0 : ends[r.stop - 1]]
            for at in cuts(len(members), step):
                some = members[at]
                h = self.head.h[some // tokens].to(self.wide)
                rows.index_add_(0, place[some] - r.start, h.mul_(terms[some, None]))
            self.sum[labels[r]] = rows.to(self.sum.dtype)

    def finish(self) -> Tensor:
        """dw in the dtype of w."""
        if len(self.head.h) == 0 and not self.started:
            self.sum.zero_()
        if self.terms is not None and self.terms.numel():
            self._add_late(self.terms)
        return self.sum.to(self.head.w.dtype)
