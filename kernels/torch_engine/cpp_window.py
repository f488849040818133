"""One window of exponentials of a float32 head by the C++ kernel: one parallel region for all of its products.

The arithmetic is that of `exponentials.fill` for a z that is h wᵀ times a constant. Each share of the classes
(`items_of`) sums E w for itself; the sums are added up in order, so that results do not depend on which thread was
faster.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from fusedhead.kernels.contract import Head, Needs, Windows
from fusedhead.kernels.torch_engine.block_window import RowScale
from fusedhead.kernels.torch_engine.blocks import EXP2_FACTOR, SAMPLED_COLUMNS, Cells, block_columns
from fusedhead.kernels.torch_engine.cpp_library import library
from fusedhead.kernels.torch_engine.exponentials import Level, level_at, max_with_labels
from fusedhead.kernels.torch_engine.gradient_sink import Sink

LANES = 32  # tokens and hidden sizes are filled up to a multiple of this
ALIASED, GAP = 256, 16  # rows a multiple of ALIASED apart fall into the same few cache lines: GAP numbers separate them
PANEL = 112  # classes of one panel, which stays in a core's cache
ROW_THREADS = 4  # up to this many threads, one thread does all the work that is done once a token
READ_POINTERS = ("h", "w", "y", "labelled", "classes", "shift", "s", "t", "g", "uw")
WRITTEN_POINTERS = ("picked", "level", "e", "dh", "dw", "total", "packed_h", "packed_hs", "sums", "own")
COUNTS = ("tokens", "hidden", "vocab", "labels", "cells", "lanes", "padded_hidden", "w_row", "w_column", "items")


class Arguments(ctypes.Structure):
    """The kernel's `Window`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in (*READ_POINTERS, *WRITTEN_POINTERS)),
        *((name, ctypes.c_int64) for name in (*COUNTS, "panel", "threads", "row_threads", "samples", "fresh")),
        ("factor", ctypes.c_double),
    )


def call_kernel(
    function: str, head: Head, i: slice, threads: int, tensors: dict[str, Tensor | None], **numbers: Any
) -> None:
    """Call one of the kernel's functions for the tokens i. A tensor without elements is passed as a null pointer."""
    kernel, (vocab, hidden), m = library(), head.w.shape, i.stop - i.start
    assert kernel is not None, "the planner asks for this kernel where it is compiled"
    by_name = {"h": head.h[i].contiguous(), "w": head.w, "y": head.y[i].contiguous(), **tensors}
    scale = 1.0 if head.transform.plain_scale is None else head.transform.plain_scale
    arguments = Arguments(
        **{name: x.data_ptr() if x is not None and x.numel() else None for name, x in by_name.items()},
        tokens=m, hidden=hidden, vocab=vocab, labels=head.y.shape[1], lanes=lanes_of(m),
        padded_hidden=whole_vectors(hidden), w_row=head.w.stride(0), w_column=head.w.stride(1),
        items=items_of(threads, vocab), panel=PANEL, threads=threads,
        row_threads=1 if threads <= ROW_THREADS else threads, samples=SAMPLED_COLUMNS, factor=EXP2_FACTOR * scale,
        **numbers,
    )  # fmt: skip
    getattr(kernel, function)(ctypes.byref(arguments))


def cpp_label_logits(head: Head, i: slice, threads: int) -> Tensor:
    """`blocks.label_logits` by the C++ kernel."""
    picked = head.h.new_empty((i.stop - i.start, head.y.shape[1]), dtype=torch.float64)
    call_kernel("label_logits", head, i, threads, {"picked": picked})
    return picked


def whole_vectors(count: int) -> int:
    """The next multiple of `LANES`."""
    return -(-count // LANES) * LANES


def lanes_of(tokens: int) -> int:
    """Numbers from one row of tokens to the next."""
    count = whole_vectors(tokens)
    return count if count % ALIASED else count + GAP


def items_of(threads: int, vocab: int) -> int:
    """The number of shares of the classes: several a thread, so that a thread the system suspends delays little."""
    return max(1, min(-(-vocab // PANEL), max(threads, min(4 * threads, 16))))


def cpp_workspace(tokens: int, vocab: int, hidden: int, needs: Needs, threads: int, keep: bool) -> int:
    """Bytes of a `CppWindow`."""
    lanes, wide, items = lanes_of(tokens), whole_vectors(hidden), items_of(threads, vocab)
    numbers = wide * lanes + threads * PANEL * (wide + lanes) + (vocab * lanes if keep else 0)
    numbers += items * tokens * wide * needs.h + 2 * (items + 1) * lanes
    numbers += tokens * wide * needs.w
    return numbers * torch.float32.itemsize


class CppWindow:
    """A `Window` by the C++ kernel, for a head with a plain scale. ``keep``: whether the window is kept whole."""

    def __init__(self, head: Head, needs: Needs, windows: Windows, keep: bool) -> None:
        self.head, self.threads = head, windows.threads
        tokens, (vocab, hidden) = min(windows.tokens, len(head.h)), head.w.shape
        lanes, wide, items = lanes_of(tokens), whole_vectors(hidden), items_of(windows.threads, vocab)
        new = head.h.new_empty
        self.strip = block_columns(tokens, vocab, torch.float32.itemsize)
        self.total = new((items + 1) * lanes, dtype=torch.float64)
        self.buffers: dict[str, Tensor | None] = {
            "e": new(vocab * lanes if keep else 0),
            "packed_h": new(wide * lanes),
            "packed_hs": new(tokens * wide if needs.w else 0),
            "sums": new(items * tokens * wide if needs.h else 0),
            "own": new(self.threads * PANEL * (wide + lanes)),
            "total": self.total,
        }

    def _call(self, function: str, i: slice, sink: Sink | None, tensors: dict[str, Tensor | None]) -> None:
        dw = None if sink is None else sink.dw
        if dw is not None:
            tensors = tensors | {"dw": dw.sum}
        fresh = dw is not None and i.start == 0 and not dw.started
        call_kernel(
            function, self.head, i, self.threads, self.buffers | tensors, fresh=fresh, cells=self._cells(tensors)
        )

    @staticmethod
    def _cells(tensors: dict[str, Tensor | None]) -> int:
        classes = tensors.get("classes")
        return 0 if classes is None else classes.numel()

    def usual_level(self, i: slice, labelled: Tensor, aim: float | None) -> Level:
        level = self.head.h.new_empty(i.stop - i.start)
        self._call("sampled_level", i, None, {"level": level})
        return level_at(self.head, max_with_labels(torch.where(level.isfinite(), level, 0), labelled), False)

    def exponentials(
        self, i: slice, h: Tensor, level: Level, cells: Cells, row_scale: RowScale | None = None
    ) -> list[Tensor]:
        inputs: dict[str, Tensor | None] = {"shift": level.shift[:, 0].contiguous()}
        inputs |= {"labelled": cells.tokens, "classes": cells.columns, "s": None if row_scale is None else row_scale.s}
        self._call("sweep", i, None if row_scale is None else row_scale.sink, inputs)
        return [self.total[: i.stop - i.start]]

    def gradients(self, i: slice, h: Tensor, s: Tensor, t: Tensor, sink: Sink) -> None:
        inputs: dict[str, Tensor | None] = {"s": s.contiguous(), "t": t.contiguous()}
        if sink.dh is not None:
            inputs["dh"] = sink.dh[i]
        if sink.g_sum is not None and sink.uw is not None:
            inputs |= {"g": sink.g_sum[i].contiguous(), "uw": sink.uw}
        self._call("gradients", i, sink, inputs)
