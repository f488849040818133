"""The float8 single pass: statistics and gradients in one sweep, with both gradient products in float8.

Per window of tokens, x = exp(z - level) is stored in e4m3 (`gluon.float8_exponentials`), and one factor a row gives

    dh = r ⊙ (E8 w8) + Σ listed value · w        dw = E8ᵀ (r ⊙ h)8 + Σ listed value · h        r = s / gain

Inputs: h [N, D], w [V, D] bfloat16, y [N, K] with K <= 1, coefficients [N] float32. Outputs: dh, dw bfloat16,
statistics [N] float32. FLOP: one product of 2NDV in bfloat16 and two in float8, which cost about half each. The list
holds what float8 must not round: the labels, and entries above `THRESHOLD` of the level. The lse comes from float32
sums of unrounded exponentials, with the reference of `triton_engine.single_pass`. A token block whose list is too long,
or whose exponentials left the safe range, is swept again with its lse as level; flags on the device decide. It then
lists fewer than 1 / `THRESHOLD` entries a row, since probabilities sum to 1. Only at logits from 2²³ on, whose lse
float32 holds to more than half a bit in base 2, and where more than 64 of a row tie, may a window list more than it has
room for: its gradients are NaN then, and nothing is written outside the list.

In memory: E8 of a window, E8T of several windows, and w8 (inside dw if E8T holds all tokens).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fusedhead.kernels.contract import Head, HeadGrads, RowGrads, RowStats, Windows
from fusedhead.kernels.triton_engine.constants import SATURATES_FLOAT8
from fusedhead.kernels.triton_engine.device.product import readable_by_tma, reads_rows
from fusedhead.kernels.triton_engine.float8.class_gradients import PIECE, class_gradients
from fusedhead.kernels.triton_engine.float8.exponentials import (
    FLOAT8_BLOCK,
    FLOAT8_PART,
    FLOAT8_TILE,
    Tail,
    float8_exponentials,
    padded,
)
from fusedhead.kernels.triton_engine.float8.level import row_levels
from fusedhead.kernels.triton_engine.float8.list_entries import count_entries, fill_entries
from fusedhead.kernels.triton_engine.float8.products import float8_product
from fusedhead.kernels.triton_engine.float8.quantize import largest, transposed_float8
from fusedhead.kernels.triton_engine.float8.row_gradients import row_gradients
from fusedhead.kernels.triton_engine.launch.launch import on_device
from fusedhead.kernels.triton_engine.launch.sweep import Sweep, sweep
from fusedhead.kernels.triton_engine.launch.tiles import PAIRED_FROM, device_of
from fusedhead.kernels.triton_engine.rows.finalize import finalize
from fusedhead.kernels.triton_engine.rows.label_map import map_labels
from fusedhead.kernels.triton_engine.rows.merge import merge_reference
from fusedhead.kernels.triton_engine.rows.reference_level import reference
from fusedhead.kernels.triton_engine.rows.unsafe_blocks import mark_unsafe
from fusedhead.kernels.triton_engine.sweeps.statistics import stream
from fusedhead.kernels.triton_engine.windows import first_rows, full_cuts, ready_rows, rows_of, slice_head, slice_rows

THRESHOLD = 2.0**-6  # an entry above this fraction of exp(level) is listed
LARGEST_E4M3 = 448.0  # the largest finite number of e4m3
FLOAT8 = torch.float8_e4m3fn
TOP_GAIN = SATURATES_FLOAT8.value / THRESHOLD
REDO_GAIN = TOP_GAIN * 2.0**-0.5  # the lse may be rounded by half a bit in base 2 before more entries are listed
ENTRIES = 64  # list entries a row, on average over a token block: 1 / THRESHOLD
DW_BYTES = 64 << 20  # bytes of one temporary product that is added to dw


def reads(head: Head) -> bool:
    """True if the kernels read h and w without a copy. `plan.float8` checks what else a float8 pass needs."""
    return (
        head.h.stride(1) == 1
        and reads_rows(head.w.stride())
        and readable_by_tma(head.h, head.w, device_of(head.h.device)[0])
    )


def one_float8_pass(head: Head, coefficients: RowGrads, windows: Windows) -> tuple[RowStats, HeadGrads]:
    """Statistics, dh and dw of a bfloat16 head without a transform, with at most one label a row.

    ``windows.tail_rows`` > 0 is the number of tokens of one E8; ``windows.tokens`` is that of one E8T.
    """
    coefficients = ready_rows(coefficients)
    (n, hidden), vocab = head.h.shape, head.w.shape[0]
    new = head.h.new_empty
    lse, lse_low, picked = (new(shape, dtype=torch.float32) for shape in (n, n, head.y.shape))
    tie = new((), dtype=torch.float32)
    with on_device(head.h):
        dh, dw = new((n, hidden)), new((vocab, hidden))
        level2 = row_levels(head)
        taller = float8_cuts(n, windows.tokens)
        w8, w8_scale = _float8_weight(head.w, dw if len(taller) == 1 else None)
        one = torch.ones_like(w8_scale)
        for outer in taller:
            part, levels = slice_head(head, outer, slice(0, vocab)), rows_of(level2, outer)
            count = outer.stop - outer.start
            columns = new((padded(vocab, FLOAT8_PART), padded(count, FLOAT8_BLOCK)), dtype=FLOAT8)
            r = new(count, dtype=torch.float32)
            listed = _Listed.new(part, count)
            inner = float8_cuts(count, windows.tail_rows)
            tallest = max(i.stop - i.start for i in inner)
            rows8 = new((padded(tallest, FLOAT8_BLOCK), padded(vocab, FLOAT8_PART)), dtype=FLOAT8)
            product = new((tallest, hidden), dtype=torch.float32)
            for i in inner:
                at = slice(outer.start + i.start, outer.start + i.stop)
                some, c, m = slice_head(part, i, slice(0, vocab)), slice_rows(coefficients, at), i.stop - i.start
                tail = Tail(rows8, columns[:, i.start :], new((m, -(-vocab // FLOAT8_TILE)), dtype=torch.uint8))
                s = sweep("exp8", some)
                totals = new((1, s.schedule.size), dtype=torch.float32)
                ref2, row_picked, row_lse = new(m, dtype=torch.float32), rows_of(picked, at), rows_of(lse, at)
                gain, counts = _swept(s, some, tail, ref2, levels[i], row_picked, totals)
                scale = finalize(
                    s, some, rows8.view(torch.bfloat16), ref2, row_picked, row_picked, totals, c._replace(picked=None),
                    row_lse, rows_of(lse_low, at), None, None, None, None, 1.0, tie, scale=torch.empty_like(ref2),
                )  # fmt: skip
                ends = _list(tail, some, scale, c, counts, listed, i.start)
                row_r = torch.div(scale, gain, out=r[i])
                float8_product(rows8[:m], w8, one, first_rows(product, m))
                row_gradients(
                    s, some, tail, product, row_r * w8_scale, ref2, gain, row_picked, totals, scale, row_lse, c, counts,
                    ends, *listed, rows_of(dh, at), i.start,
                )  # fmt: skip
            del rows8, product, tail
            _add_to_weight(part.h, columns[:vocab], r, dw, outer.start == 0)
            del columns
            class_gradients(*listed, part.h, dw)
    return RowStats(lse, picked, lse_low=lse_low, tie=tie), HeadGrads(dh, dw, None, None)


def float8_cuts(total: int, size: int) -> list[slice]:
    """Windows of ``size`` tokens, the last one shorter, but no window so short that no pair of warpgroups takes it.

    Such a one gets a token block of the window before, unless that has no other.
    """
    cuts = full_cuts(total, size)
    if len(cuts) > 1 and total - cuts[-1].start < PAIRED_FROM and size > FLOAT8_BLOCK:
        at = cuts[-1].start - FLOAT8_BLOCK
        cuts[-2:] = [slice(cuts[-2].start, at), slice(at, total)]
    return cuts


class _Listed(NamedTuple):
    """The list of several windows; each window has room for `ENTRIES` entries and one label a row."""

    classes: Tensor  # [capacity] int32, V where there is no entry
    values: Tensor  # [capacity] float32: dz of the entry
    tokens: Tensor  # [capacity] int32

    @classmethod
    def new(cls, head: Head, rows: int) -> _Listed:
        room = padded(_room(padded(rows, FLOAT8_BLOCK)), PIECE)
        classes = head.h.new_full((room,), head.w.shape[0], dtype=torch.int32)
        return cls(classes, torch.empty_like(classes, dtype=torch.float32), torch.empty_like(classes))


def _room(rows: int) -> int:
    return (ENTRIES + 1) * rows


def _list(tail: Tail, head: Head, scale: Tensor, c: RowGrads, counts: Tensor, listed: _Listed, first: int) -> Tensor:
    """Fill the list; returns ends [M] of the rows' entries. Counts of rows with no gradient, or with NaN, become 0.

    Where the window has no room for its entries, nothing is listed, and scale [M] becomes NaN.
    """
    none = scale == 0 if c.picked is None else (scale == 0) & (c.picked[:, 0] == 0)
    counts.masked_fill_(none | scale.isnan(), 0)
    ends = counts.cumsum(0, dtype=torch.int32)
    crowded = ends[-1] > _room(padded(len(ends), FLOAT8_BLOCK))
    counts.masked_fill_(crowded, 0)
    scale.masked_fill_(crowded, float("nan"))
    ends.add_(_room(first))
    fill_entries(tail, head.y, counts, ends, listed.classes)
    return ends


def _float8_weight(w: Tensor, dw: Tensor | None) -> tuple[Tensor, Tensor]:
    """(w8 [D, V'] with its classes in the order of E8, its scale [] float32). w8 lies inside ``dw`` if it has room."""
    vocab, hidden = w.shape
    shape = hidden, padded(vocab, FLOAT8_PART)
    if dw is None or shape[0] * shape[1] > dw.numel() * dw.itemsize:
        w8 = w.new_empty(shape, dtype=FLOAT8)
    else:
        w8 = dw.view(-1).view(FLOAT8)[: shape[0] * shape[1]].view(shape)
    top = largest(w)
    transposed_float8(w, top, w8)
    return w8, top / LARGEST_E4M3


def _swept(
    s: Sweep, head: Head, tail: Tail, ref2: Tensor, level2: Tensor, picked: Tensor, totals: Tensor
) -> tuple[Tensor, Tensor]:
    """Fill tail, picked and totals of a window; returns (gain [M] float32, entries of each row [M] int32)."""
    redo = s.beside("stream")
    labels = map_labels(s, head.y, check=True) if s.labels else None
    reference(redo, head, ref2)
    level2 = torch.maximum(level2, ref2) if s.labels else level2
    gain = (ref2 - level2).exp2_().mul_(TOP_GAIN)
    float8_exponentials(s, head, tail, ref2, gain, picked, totals, labels)
    flags = mark_unsafe(s, totals)
    counts = torch.empty_like(ref2, dtype=torch.int32)
    count_entries(tail, head.y, counts)
    blocks = torch.nn.functional.pad(counts, (0, -s.n % s.tile.BM)).view(-1, s.tile.BM)
    flags |= blocks.sum(1) > _room(s.tile.BM)
    rows, _ = stream(redo, head, frozenset({"lse"}), None, flags)
    merge_reference(redo, rows, ref2, 0.0, flags)
    marked = flags.view(-1, 1).expand(-1, s.tile.BM).reshape(-1)[: s.n]
    gain.masked_fill_(marked != 0, REDO_GAIN)
    float8_exponentials(s, head, tail, ref2, gain, picked, totals, labels, flags)
    count_entries(tail, head.y, counts, flags, s.tile.BM)
    return gain, counts


def _add_to_weight(h: Tensor, columns: Tensor, r: Tensor, dw: Tensor, first: bool) -> None:
    """dw [V, D] += E8ᵀ (r ⊙ h)8, or <- with ``first``; the tokens of both are in the order of E8T."""
    hidden = h.shape[1]
    top = largest(h, r)
    h8 = h.new_empty((hidden, columns.shape[1]), dtype=FLOAT8)
    transposed_float8(h, top, h8, r, tokens=True)
    scale = top / LARGEST_E4M3
    if first:
        float8_product(columns, h8, scale, dw)
        return
    step = min(max(FLOAT8_BLOCK, DW_BYTES // (2 * hidden)), len(dw))
    product = torch.empty_like(dw[:step])  # one for all: a new one would be made before the last is freed
    for at in range(0, len(dw), step):
        rows = slice(at, min(at + step, len(dw)))
        more = first_rows(product, rows.stop - at)
        float8_product(columns[rows], h8, scale, more)
        dw[rows] += more
