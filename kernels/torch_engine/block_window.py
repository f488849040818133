"""One window of exponentials by torch ops, block by block of the vocabulary."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from fusedhead.kernels.contract import Head, Needs, Windows, stat_dtype
from fusedhead.kernels.torch_engine.blocks import Cells, block_columns, cuts, strip_columns, widened_columns
from fusedhead.kernels.torch_engine.exponentials import Level, fill, usual_level
from fusedhead.kernels.torch_engine.gradient_sink import Sink, accumulate_product
from fusedhead.kernels.torch_engine.product_dtypes import kept_dtype, product_dtype


class RowScale(NamedTuple):
    """Row scales known before the sweep, with which each block goes to the gradients as soon as it is filled."""

    s: Tensor  # [m] in the statistics' dtype
    sink: Sink


class Window(Protocol):
    """A window of exponentials E' (`exponentials`), reused by every window of a sweep."""

    @property
    def strip(self) -> int:
        """The number of columns that other sweeps over the same window hold at a time."""
        ...

    def usual_level(self, i: slice, labelled: Tensor, aim: float | None) -> Level:
        """`exponentials.usual_level` of the tokens i."""
        ...

    def exponentials(
        self, i: slice, h: Tensor, level: Level, cells: Cells, row_scale: RowScale | None = None
    ) -> list[Tensor]:
        """Fill the window of the tokens i and sum E' w: parts [m] of the row sums of E.

        h [m, D] is in the dtype of the products. With ``row_scale`` each block goes to the gradients of w and of the
        column vectors as soon as it is filled.
        """
        ...

    def gradients(self, i: slice, h: Tensor, s: Tensor, t: Tensor, sink: Sink) -> None:
        """Add the terms of E' w, of a kept window's blocks and of the labels to the gradients.

        s [m] are the row scales and t [m, K] the label terms.
        """
        ...


class BlockWindow:
    """A `Window` by torch ops, kept whole with ``keep`` and else only block by block.

    A window that is stored in fewer bytes than it is multiplied in (`kept_dtype`) is widened strip by strip.
    """

    def __init__(self, head: Head, needs: Needs, windows: Windows, keep: bool) -> None:
        wide, work = stat_dtype(head.h.dtype), product_dtype(head.h.dtype, head.h.device.type)
        vocab, tokens = len(head.w), min(windows.tokens, len(head.h))
        self.head, self.needs, self.keep, self.wide, self.work = head, needs, keep, wide, work
        self.kept = kept_dtype(head.h.dtype, work, head.transform) if keep else work
        columns = block_columns(tokens, min(windows.vocab, vocab), wide.itemsize)
        if self.kept != work:
            columns = widened_columns(tokens, columns, head.h.shape[1], wide.itemsize)
        self.blocks = list(cuts(vocab, columns))
        self.flat = head.h.new_empty(tokens * (vocab if keep else columns), dtype=self.kept)
        self.strip = strip_columns(tokens, columns, wide.itemsize) if keep else columns
        self.spare = head.h.new_empty(0 if self.kept == wide else tokens * self.strip, dtype=wide)

    def _block(self, m: int, v: slice) -> Tensor:
        return self.flat[m * v.start if self.keep else 0 :][: m * (v.stop - v.start)].view(m, v.stop - v.start)

    def usual_level(self, i: slice, labelled: Tensor, aim: float | None) -> Level:
        return usual_level(self.head, i, labelled, aim)

    def exponentials(
        self, i: slice, h: Tensor, level: Level, cells: Cells, row_scale: RowScale | None = None
    ) -> list[Tensor]:
        head, parts = self.head, []
        self.product = h.new_zeros((len(h), h.shape[1] if self.needs.h else 0), dtype=self.wide)
        wanted = self.keep or self.needs.h or row_scale is not None
        scaled = row_scale is not None and (self.needs.w or self.needs.cols)
        hs = (h * row_scale.s[:, None]).to(self.work) if scaled and row_scale is not None else h
        for v in self.blocks:
            e, w = self._block(len(h), v), head.w[v].to(self.work)
            into = e if self.kept == self.work else self.spare[: e.numel()].view(e.shape)
            parts += fill(head, i, v, h, w, level, cells, into, self.spare, wanted)
            if self.needs.h:
                accumulate_product(self.product, into, w)
            if row_scale is not None:
                row_scale.sink.block(i, v, into, hs, row_scale.s)
            elif into is not e:
                e.copy_(into)
        return parts

    def gradients(self, i: slice, h: Tensor, s: Tensor, t: Tensor, sink: Sink) -> None:
        sink.hidden(i, self.product, s, t)
        if self.keep:
            hs = (h * s[:, None]).to(self.work)
            for v in self.blocks:
                e = self._block(len(h), v)
                if self.kept != self.work:
                    e = self.spare[: e.numel()].view(e.shape).copy_(e)
                sink.block(i, v, e, hs, s)
        sink.labels(i, t)
