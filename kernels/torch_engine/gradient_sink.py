"""Where the gradients of one sweep over exponentials are gathered: dh, dw and the column vectors' sums.

The sweep hands over E' w of a window, blocks of E', row scales s and label terms t (`softmax_gradients` defines them);
this file scales, adds and rounds.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusedhead.kernels.contract import Head, HeadGrads, Needs, RowGrads, Windows, stat_dtype
from fusedhead.kernels.torch_engine.blocks import label_rows
from fusedhead.kernels.torch_engine.weight_gradient import BlockWeightGradient
from fusedhead.kernels.torch_engine.weighted_sums import weighted_columns, weighted_hidden


class Sink:
    """The sums of one sweep's gradients: dh, dw and those of the column vectors."""

    def __init__(self, head: Head, upstream: RowGrads, needs: Needs, windows: Windows) -> None:
        self.head, self.needs, self.wide = head, needs, stat_dtype(head.h.dtype)
        self.g_sum = None if upstream.sum is None else upstream.sum.to(self.wide)
        scale = head.transform.plain_scale
        self.dh = head.h.new_empty(head.h.shape, dtype=windows.dh_dtype(head)) if needs.h else None
        self.dw = BlockWeightGradient(head, windows.accumulate) if needs.w else None
        self.dcols = head.h.new_zeros(len(head.w), dtype=self.wide) if needs.cols else None
        self.uw: Tensor | None = None
        if self.g_sum is not None and scale is not None:
            self.uw = weighted_columns(head, self.wide) * scale if needs.h else None
            if self.dw is not None:
                u = head.u if head.u.numel() else head.h.new_ones(len(head.w), dtype=self.wide)
                self.dw.begin_with(u, weighted_hidden(head, self.g_sum) * scale)

    def hidden(self, i: slice, product: Tensor, s: Tensor, t: Tensor) -> None:
        """dh of window i from E' w [m, D], which is overwritten, row scales s [m] and label terms t [m,
        K].
        """
        if self.dh is None:
            return
        product.mul_(s[:, None])
        for k in range(t.shape[1]):
            for at, rows in label_rows(self.head, i, k, self.wide):
                product[at].addcmul_(rows, t[at, k, None])
        if self.uw is not None and self.g_sum is not None:
            product.addcmul_(self.uw[None], self.g_sum[i, None])
        self.dh[i] = product

    def block(self, i: slice, v: slice, e: Tensor, h: Tensor, s: Tensor) -> None:
        """dw and column sums from one block: e [m, v], h = s ⊙ hidden in the products' dtype."""
        if self.dw is not None:
            self.dw.add_block(v, i.start == 0, e, h)
        if self.dcols is not None:
            self.dcols[v] += torch.mv(e.to(self.wide).t(), s)

    def labels(self, i: slice, t: Tensor) -> None:
        if self.dw is not None:
            self.dw.add_labels(i, t)
        if self.dcols is not None:
            self.dcols.index_add_(0, self.head.y[i].reshape(-1), t.reshape(-1))

    def finish(self) -> HeadGrads:
        dcols = None
        if self.dcols is not None:
            slopes = self.head.transform.bias_slopes(len(self.head.cols))
            factors = torch.tensor(slopes, dtype=self.wide, device=self.dcols.device)
            dcols = (factors[:, None] * self.dcols).to(self.head.cols.dtype)
        return HeadGrads(self.dh, None if self.dw is None else self.dw.finish(), dcols, None)


def accumulate_product(into: Tensor, e: Tensor, w: Tensor) -> None:
    """into += e w, with ``into`` in the statistics' dtype whatever that of the products."""
    if into.dtype == e.dtype:
        into.addmm_(e, w)
    else:
        into.add_(e @ w)
