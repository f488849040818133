"""dw [V, D] as a sum over windows of tokens, in its own dtype or in float32.

    dw[v] += window[:, v]ᵀ x        window [M, V'] and x [M, D] in the dtype of w, 2 M V' D FLOP

A float32 sum of a 2-byte dw takes twice its memory, and dw itself is half of that: float32 rows of the first half of
the vocabulary lie in dw until the end, and only the other half is allocated. The last step rounds, packs the first
half to the front of dw (a doubling number of rows at a time, so that nothing is overwritten before it was read) and
puts the other half behind it. It must not know what a window holds.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fusedhead.kernels.triton_gemm import gemm
from fusedhead.kernels.triton_operands import rows_of

FIRST_SHARE = 64  # of the rows that are packed first, through a copy


class WeightGradient:
    """The sum while it grows: ``add`` once a window and slice of the vocabulary, then ``finish``."""

    def __init__(self, w: Tensor, windows: int, accumulate: torch.dtype) -> None:
        self.result = w.new_empty(w.shape)
        self.parts = [(0, self.result)]  # (first row, sums of the rows from there on)
        self.started = False
        if windows > 1 and accumulate != w.dtype:
            vocab, hidden = w.shape
            ratio = accumulate.itemsize // w.dtype.itemsize
            inside = vocab // ratio  # rows of sums that dw has room for
            own = self.result.view(-1)[: inside * hidden * ratio].view(accumulate).view(inside, hidden)
            self.parts = [(0, own), (inside, w.new_empty((vocab - inside, hidden), dtype=accumulate))]

    def _pieces(self, v: slice) -> Iterator[tuple[slice, Tensor]]:
        """The slice cut where the sums are: (rows counted from its start, their sums)."""
        for first, rows in self.parts:
            start, stop = max(v.start, first), min(v.stop, first + len(rows))
            if start < stop:
                yield slice(start - v.start, stop - v.start), rows_of(rows, slice(start - first, stop - first))

    def start(self, weights: Tensor, row: Tensor) -> None:
        """Begin with the rank-one term weights ⊗ row."""
        for at, rows in self._pieces(slice(0, len(self.result))):
            torch.mul(weights[at, None], row[None, :], out=rows)
        self.started = True

    def add(self, window: Tensor, v: slice, x: Tensor, first: bool, alpha: float = 1.0) -> None:
        """Add the columns ``v`` of the vocabulary; ``first`` where nothing was added to them before."""
        for at, rows in self._pieces(v):
            part = window if at == slice(0, window.shape[1]) else window[:, at]
            gemm(part.t(), x, rows, add=self.started or not first, alpha=alpha)

    def finish(self) -> Tensor:
        """dw [V, D] in the dtype of w."""
        if len(self.parts) > 1:
            (_, own), (inside, others) = self.parts
            done = -(-inside // FIRST_SHARE)
            self.result[:done] = own[:done].clone()
            while done < inside:
                more = min(2 * done, inside)  # rows up to 2 · done of dw end where row ``done`` of the sums begins
                self.result[done:more] = own[done:more]
                done = more
            self.result[inside:] = others
        return self.result
