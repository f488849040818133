"""Sums in float32 of a result of two bytes, half of which lie in the result's own memory.

A float32 sum takes twice the memory of its result, and the result itself is half of that: sums of the first half of its
rows lie there until the end, and only those of the other half are allocated. The last step rounds, packs the first half
to the front (a doubling number of rows at a time, so that nothing is overwritten before it was read) and puts the other
half behind it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fusedhead.kernels.triton_engine.windows import rows_of

FIRST_SHARE = 64  # of the rows that are packed first, through a copy


class NarrowSum:
    """Sums [rows, columns] that end as ``result`` [rows, columns], contiguous; in its own dtype they lie in it."""

    def __init__(self, result: Tensor, accumulate: torch.dtype) -> None:
        self.result = result
        self.parts = [(0, result)]  # (first row, sums of the rows from there on)
        if accumulate != result.dtype:
            rows, columns = result.shape
            ratio = accumulate.itemsize // result.dtype.itemsize
            inside = rows // ratio  # rows of sums that the result has room for
            if result.storage_offset() % ratio:  # where no sum can lie
                inside = 0
            others = result.new_empty((rows - inside, columns), dtype=accumulate)
            self.parts = [(inside, others)]
            if inside:
                own = result.view(-1)[: inside * columns * ratio].view(accumulate).view(inside, columns)
                self.parts.insert(0, (0, own))

    def pieces(self, v: slice) -> Iterator[tuple[slice, Tensor]]:
        """The rows ``v`` cut where the sums are: (rows counted from its start, their sums)."""
        for first, rows in self.parts:
            start, stop = max(v.start, first), min(v.stop, first + rows.shape[0])
            if start < stop:
                yield slice(start - v.start, stop - v.start), rows_of(rows, slice(start - first, stop - first))

    def finish(self) -> Tensor:
        """The result, rounded once."""
        *packed, (inside, others) = self.parts
        for _, own in packed:
            done = -(-inside // FIRST_SHARE)
            self.result[:done] = own[:done].clone()
            while done < inside:
                more = min(2 * done, inside)  # rows up to 2 · done of the result end where row ``done`` of sums begins
                self.result[done:more] = own[done:more]
                done = more
        if others is not self.result:
            self.result[inside:] = others
        return self.result
