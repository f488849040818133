"""One window of exponentials of a float32 head by the C++ kernel: one parallel region for all of its products.

The arithmetic is that of `exponentials.fill` for a z that is h wᵀ times a constant. Each share of the classes
(`items_of`) sums E w for itself; the sums are added up in order, so that results do not depend on which thread was
faster.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from fusedhead.kernels.contract import Head, Needs, Windows
from fusedhead.kernels.torch_engine.block_window import KnownScale
from fusedhead.kernels.torch_engine.blocks import EXP2_FACTOR, Cells, block_columns
from fusedhead.kernels.torch_engine.cpp_library import library
from fusedhead.kernels.torch_engine.exponentials import Level

LANES = 32  # tokens and hidden sizes are filled up to a multiple of this
ALIASED, GAP = 256, 16  # rows of tokens a multiple of the first apart share few places of a cache: a gap between them
PANEL = 112  # classes that pass through a core's cache at once
TOKENS = ("h", "w", "hs", "shift", "labelled", "classes", "e", "dh", "dw", "total", "packed_h", "packed_hs", "sums")
SIZES = ("tokens", "hidden", "vocab", "labels", "lanes", "padded_hidden", "w_row", "w_column", "items", "panel")


class Arguments(ctypes.Structure):
    """The kernel's `Window`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in (*TOKENS, "own")),
        *((name, ctypes.c_int64) for name in (*SIZES, "threads", "fresh")),
        ("factor", ctypes.c_double),
    )


def padded(count: int) -> int:
    """The next multiple of `LANES`."""
    return -(-count // LANES) * LANES


def lanes_of(tokens: int) -> int:
    """Numbers from one row of tokens to the next."""
    count = padded(tokens)
    return count if count % ALIASED else count + GAP


def items_of(threads: int, vocab: int) -> int:
    """Shares of the classes: some a thread, so that one that is put aside holds up little."""
    return max(1, min(-(-vocab // PANEL), max(threads, min(4 * threads, 16))))


def cpp_workspace(tokens: int, vocab: int, hidden: int, needs: Needs, threads: int, keep: bool) -> int:
    """Bytes of a `CppWindow`, and of s h and E w of its tokens."""
    lanes, wide, items = lanes_of(tokens), padded(hidden), items_of(threads, vocab)
    numbers = wide * lanes + threads * PANEL * (wide + lanes) + (vocab * lanes if keep else 0)
    numbers += items * tokens * wide * needs.h + 2 * (items + 1) * lanes
    numbers += tokens * hidden * (needs.h + needs.w) + tokens * wide * needs.w
    return numbers * torch.float32.itemsize


class CppWindow:
    """A `Window` by the C++ kernel, for a head with a plain scale. ``keep``: whether the window is kept whole."""

    def __init__(self, head: Head, needs: Needs, windows: Windows, keep: bool) -> None:
        self.head, self.needs, self.threads = head, needs, windows.threads
        tokens, (vocab, hidden) = min(windows.tokens, len(head.h)), head.w.shape
        lanes, wide, self.items = lanes_of(tokens), padded(hidden), items_of(windows.threads, vocab)
        new = head.h.new_empty
        self.strip = block_columns(tokens, vocab, torch.float32.itemsize)
        self.e = new(vocab * lanes if keep else 0)
        self.packed_h = new(wide * lanes)
        self.packed_hs = new(tokens * wide if needs.w else 0)
        self.sums = new(self.items * tokens * wide if needs.h else 0)
        self.own = new(self.threads * PANEL * (wide + lanes))
        self.total = new((self.items + 1) * lanes, dtype=torch.float64)

    def _arguments(self, m: int, given: dict[str, Tensor], known: KnownScale | None, i: slice) -> Arguments:
        """The kernel's arguments for m tokens; ``given`` tensors must live until it returns."""
        head, w = self.head, self.head.w
        dw = None if known is None else known.sink.dw
        if known is not None and dw is not None:
            given = given | {"hs": known.hs, "dw": dw.sum}
        buffers = {name: getattr(self, name) for name in ("e", "packed_h", "packed_hs", "sums", "own", "total")}
        pointers = {name: x.data_ptr() if x.numel() else None for name, x in (buffers | given).items()}
        scale = 1.0 if head.transform.plain_scale is None else head.transform.plain_scale
        return Arguments(
            **pointers,
            tokens=m, hidden=w.shape[1], vocab=w.shape[0], lanes=lanes_of(m), padded_hidden=padded(w.shape[1]),
            labels=given["classes"].numel() if "classes" in given else 0,
            w_row=w.stride(0), w_column=w.stride(1), items=self.items, panel=PANEL, threads=self.threads,
            fresh=dw is not None and i.start == 0 and not dw.started, factor=EXP2_FACTOR * scale,
        )  # fmt: skip

    def exponentials(
        self, i: slice, h: Tensor, level: Level, cells: Cells, known: KnownScale | None = None
    ) -> tuple[list[Tensor], Tensor]:
        h, product = h.contiguous(), h.new_empty((len(h), h.shape[1] if self.needs.h else 0))
        given = {"h": h, "w": self.head.w, "shift": level.shift[:, 0].contiguous(), "dh": product}
        given |= {"labelled": cells.tokens, "classes": cells.columns}
        kernel = library()
        assert kernel is not None
        kernel.sweep(ctypes.byref(self._arguments(len(h), given, known, i)))
        return [self.total[: len(h)]], product

    def weight_gradient(self, i: slice, known: KnownScale) -> None:
        kernel = library()
        assert kernel is not None
        if known.sink.dw is not None:
            kernel.add_weight_gradient(ctypes.byref(self._arguments(i.stop - i.start, {}, known, i)))
