"""The weight gradient dw [V, D], a sum over windows of tokens in the dtype of w or in float32.

    dw[v] += window[:, v]ᵀ x        window [M, V'] and x [M, D] in the dtype of w

FLOP 2MDV' a window. Bytes: window and x read once; the rows ``v`` of the sum written, and read where they are added to.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusedhead.kernels.gemm import gemm
from fusedhead.kernels.narrow_sum import NarrowSum


class WeightGradient:
    """The running sum: ``add`` once per window and slice of the vocabulary, then ``finish``."""

    def __init__(self, w: Tensor, windows: int, accumulate: torch.dtype) -> None:
        self.sums = NarrowSum(w.new_empty(w.shape), accumulate if windows > 1 else w.dtype)
        self.started = False

    def start(self, weights: Tensor, row: Tensor) -> None:
        """Begin with the rank-one term weights ⊗ row."""
        for at, rows in self.sums.pieces(slice(0, len(self.sums.result))):
            torch.mul(weights[at, None], row[None, :], out=rows)
        self.started = True

    def add(self, window: Tensor, v: slice, x: Tensor, first: bool, alpha: float = 1.0) -> None:
        """Add alpha · windowᵀ x to the rows ``v``; ``first``: nothing was added to these rows before."""
        for at, rows in self.sums.pieces(v):
            part = window if at.start == 0 and at.stop == window.shape[1] else window[:, at]
            gemm(part.t(), x, rows, add=self.started or not first, alpha=alpha)

    def finish(self) -> Tensor:
        """dw [V, D] in the dtype of w."""
        return self.sums.finish()
