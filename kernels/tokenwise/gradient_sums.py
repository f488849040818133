"""Gradients of a token program that grow window by window: dh = dz w, dw += dzᵀ h, db += Σ dz, and other inputs'.

Inputs: dz [n, V] of a group of windows, h [n, D], w [V, D], the gradients of other inputs. Outputs: one gradient for
each input that needs one, in its dtype. Sums over tokens are float32 (float64 for float64) and rounded once, or in the
input's dtype with ``narrow``. FLOP: 2 n V D for dh, 2 n V D for dw.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fusedhead.kernels.contract import stat_dtype
from fusedhead.kernels.gemm import gemm
from fusedhead.kernels.narrow_sum import NarrowSum
from fusedhead.kernels.torch_engine.blocks import cuts

PRODUCT_BYTES = 256 << 20  # the largest temporary dzᵀ h that is added to dw on a CPU


def adds_in_epilogue(device: torch.device) -> bool:
    """Whether a product of two bytes adds to a float32 sum without being rounded first."""
    return device.type == "cuda"


class GradientSums:
    """Gradients that grow window by window: rows of some inputs, sums over the tokens of the others."""

    def __init__(
        self,
        tensors: Sequence[Tensor],
        needs: Sequence[bool],
        rows: frozenset[int],
        narrow: bool,
        weights: frozenset[int],
    ) -> None:
        self.tensors, self.rows = tensors, rows
        self.weights = {
            at: NarrowSum(
                torch.empty_like(w, memory_format=torch.contiguous_format), w.dtype if narrow else stat_dtype(w.dtype)
            )
            for at, w in enumerate(tensors)
            if needs[at] and at in weights
        }
        self.begun: set[tuple[int, int]] = set()  # (input, first row): where something was added before
        self.into = [
            t.new_empty(t.shape, dtype=t.dtype if i in rows or narrow else stat_dtype(t.dtype))
            if need and i not in weights
            else None
            for i, (t, need) in enumerate(zip(tensors, needs))
        ]

    def _target(self, at: int, i: slice) -> tuple[Tensor | None, bool]:
        """(the buffer for the gradient of input ``at`` from the tokens ``i``, whether it holds a sum already)."""
        into = self.into[at]
        if into is None:
            return None, False
        first = (at, i.start if at in self.rows else 0)
        begun = first in self.begun
        self.begun.add(first)
        return into[i] if at in self.rows else into, begun

    def add(self, at: int, i: slice, gradient: Tensor) -> None:
        into, begun = self._target(at, i)
        if into is not None:
            (into.add_ if begun else into.copy_)(gradient)

    def add_bias(self, at: int, row: int, i: slice, dz: Tensor) -> None:
        into = self.into[at]
        if into is not None:
            if (at, 0) not in self.begun:
                self.begun.add((at, 0))
                into.zero_()
            into[row].add_(dz.sum(0, dtype=into.dtype))

    def add_head(self, head: tuple[int, int], bias: tuple[int, int] | None, i: slice, dz: Tensor) -> None:
        """dh, dw and db of the inputs ``head`` and ``bias``: dz w, dzᵀ h and Σ dz for the tokens ``i``."""
        h, w = head
        into, begun = self._target(h, i)
        if into is not None:
            gemm(dz, self.tensors[w], into, add=begun)
        self.add_weight(w, dz, self.tensors[h][i])
        if bias is not None:
            self.add_bias(*bias, i, dz)

    def add_weight(self, at: int, dz: Tensor, h: Tensor) -> None:
        """dw += dzᵀ h."""
        if at not in self.weights:
            return
        begun = (at, 0) in self.begun
        self.begun.add((at, 0))
        for v, into in self.weights[at].pieces(slice(0, dz.shape[1])):
            if adds_in_epilogue(dz.device):
                gemm(dz[:, v].t(), h, into, add=begun)
                continue
            for part in cuts(len(into), max(1, PRODUCT_BYTES // max(1, into.element_size() * into.shape[1]))):
                some = dz[:, v.start + part.start : v.start + part.stop]
                if into.dtype == dz.dtype:
                    gemm(some.t(), h, into[part], add=begun)
                else:
                    (into[part].add_ if begun else into[part].copy_)(some.t() @ h)

    def finish(self) -> list[Tensor | None]:
        """The gradients in the inputs' dtypes, zeros where nothing was added."""
        touched = {at for at, _ in self.begun}
        found: list[Tensor | None] = []
        for at, (into, t) in enumerate(zip(self.into, self.tensors)):
            if into is None and at not in self.weights:
                found.append(None)
            elif at not in touched:
                found.append(torch.zeros_like(t))
            else:
                found.append(self.weights[at].finish() if into is None else into.to(t.dtype))
        return found
