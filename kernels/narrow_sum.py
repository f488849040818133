"""Narrow sums: a result of two bytes is summed in float32, and half of the sums lie in the result's own memory.

Float32 sums need twice the memory of the result. The result's memory holds those of the first half of its rows, so that
only those of the second half are allocated. At the end the first half is rounded into the front of the result, a
doubling number of rows at a time so that no sum is overwritten before it is read; then the second half is rounded
behind it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

FIRST_SHARE = 64  # 1 / FIRST_SHARE of the rows are rounded first, through a copy


class NarrowSum:
    """Sums that become ``result`` [rows, columns], contiguous.

    ``accumulate`` is their dtype: float32, or the result's own, whose sums all lie in the result.
    """

    def __init__(self, result: Tensor, accumulate: torch.dtype) -> None:
        self.result = result
        self.parts = [(0, result)]  # (first row, sums of the rows from there on)
        if accumulate != result.dtype:
            rows, columns = result.shape
            ratio = accumulate.itemsize // result.dtype.itemsize
            inside = rows // ratio  # rows of sums that fit into the result's memory
            if result.storage_offset() % ratio:  # not aligned for the wider dtype
                inside = 0
            rest = result.new_empty((rows - inside, columns), dtype=accumulate)
            self.parts = [(inside, rest)]
            if inside:
                front = result.view(-1)[: inside * columns * ratio].view(accumulate).view(inside, columns)
                self.parts.insert(0, (0, front))

    def pieces(self, v: slice) -> Iterator[tuple[slice, Tensor]]:
        """The rows ``v`` in pieces that lie in one buffer each: (rows counted from v.start, the sums of these rows)."""
        for first, rows in self.parts:
            start, stop = max(v.start, first), min(v.stop, first + rows.shape[0])
            if start < stop:
                whole = start == first and stop == first + rows.shape[0]  # making a view costs about a launch
                yield (
                    slice(start - v.start, stop - v.start),
                    rows if whole else rows[start - first : stop - first],
                )

    def finish(self) -> Tensor:
        """The result, each sum rounded once."""
        *packed, (inside, rest) = self.parts
        for _, front in packed:
            done = -(-inside // FIRST_SHARE)
            self.result[:done] = front[:done].clone()
            while done < inside:
                more = min(2 * done, inside)  # 2 · done rows of the result end where row ``done`` of the sums begins
                self.result[done:more] = front[done:more]
                done = more
        if rest is not self.result:
            self.result[inside:] = rest
        return self.result
