"""Class gradients: what the listed entries of the float8 single pass add to dw, in a fixed order.

    dw[class_j] += value_j h[token_j]

in: the list sorted by class (stably, hence by token within a class), h [S, D] bfloat16. out: dw [V, D] bfloat16, the
rows of listed classes read and written. FLOP 2D an entry; bytes: 2D an entry and 4D a class. One program adds up each
piece of `PIECE` entries, whatever their classes, so that a class with thousands of entries is spread over many
programs: `TOGETHER` entries at once, by a product of their rows of h with a small matrix, which has the values of
entries that share a class. A class within one piece is added to its row of dw at once. For a class that spans pieces,
each piece stores its sum, and a second kernel adds these sums in order. There are no atomics, so the result is the same
in every run.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedhead.kernels.triton_engine.launch.launch import Launch
from fusedhead.kernels.triton_engine.launch.sweep import KEPT

PIECE = 128  # entries that one program adds up
TOGETHER = 16  # entries whose rows of h it reads at once, and adds up by class in one small product


@triton.jit
def _add_row(dw, v, col, inside, D, acc):
    at = dw + v.to(tl.int64) * D + col
    old = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(at, (old + acc).to(dw.dtype.element_ty), mask=inside)


@triton.jit
def _leave(dw, sums, v, acc, before, after, piece, col, inside, D):
    """Stores the sum of a run of one class: added to its row of dw, or in ``sums`` if the class spans pieces."""
    if (v == before) | (v == after):
        which = tl.where(v == before, 0, 1)
        tl.store(sums + (2 * piece + which).to(tl.int64) * D + col, acc, mask=inside)
    else:
        _add_row(dw, v, col, inside, D, acc)


@triton.jit
def _entries(classes, order, values, tokens, at, V, count):
    """The classes of the entries ``at`` and of the entries after them; the values and tokens of the former."""
    v = tl.load(classes + at, mask=at < count, other=V)
    following = tl.load(classes + at + 1, mask=at + 1 < count, other=V)
    source = tl.load(order + at, mask=at < count, other=0)
    return v, following, tl.load(values + source, mask=v < V, other=0.0), tl.load(tokens + source, mask=v < V, other=0)


@triton.jit(do_not_specialize=("V", "D", "count"))
def piece_kernel(
    classes,  # [count] int32, sorted; V where there is no entry
    order,  # [count] int64: the index of an entry in values and tokens
    values,  # [count] float32
    tokens,  # [count] int32
    h,  # [S, D]
    dw,  # [V, D]
    sums,  # [2 · pieces, D] float32: of a run that continues the piece before, of one that continues in the next
    V,
    D,
    count,
    sh0,
    PIECE: tl.constexpr,
    TOGETHER: tl.constexpr,
    BD: tl.constexpr,
):
    piece = tl.program_id(0)
    start = piece * PIECE
    col = tl.program_id(1) * BD + tl.arange(0, BD)
    inside = col < D
    if tl.load(classes + start) < V:
        before = tl.load(classes + start - 1, mask=start > 0, other=-1)
        after = tl.load(classes + start + PIECE, mask=start + PIECE < count, other=-1)
        carried = V  # the class of the last run so far, and its sum
        carry = tl.zeros((BD,), tl.float32)
        each = tl.arange(0, TOGETHER)
        v, following, value, token = _entries(classes, order, values, tokens, start + each, V, count)
        for group in range(0, tl.minimum(PIECE, count - start), TOGETHER):  # not unrolled: it would take all registers
            # the next entries are loaded before these are added up
            next_at = start + group + TOGETHER + each
            next_v, next_following, next_value, next_token = _entries(classes, order, values, tokens, next_at, V, count)
            here = (v < V)[:, None] & inside[None, :]
            rows = tl.load(h + token.to(tl.int64)[:, None] * sh0 + col[None, :], mask=here, other=0.0)
            # the entry at which a run ends has its sum, and no other entry of the piece writes to its row of dw
            end = (v != following) & (each < TOGETHER - 1) & (v < V)
            to = dw + v.to(tl.int64)[:, None] * D + col[None, :]
            alone = (end & (v != before))[:, None] & inside[None, :]
            old = tl.load(to, mask=alone, other=0.0)
            same = tl.where(tl.trans(tl.expand_dims(v, 0)) == tl.expand_dims(v, 0), value[None, :], 0.0)
            if h.dtype.element_ty == tl.bfloat16:  # three terms of bfloat16 hold a float32
                high = same.to(tl.bfloat16)
                rest = same - high.to(tl.float32)
                low = rest.to(tl.bfloat16)
                out = tl.dot(high, rows)
                out = tl.dot(low, rows, out)
                out = tl.dot((rest - low.to(tl.float32)).to(tl.bfloat16), rows, out)
            else:
                out = tl.dot(same, rows.to(tl.float32), input_precision="ieee")
            first = tl.min(v, 0)
            if (carried < V) & (carried != first):
                _leave(dw, sums, carried, carry, before, after, piece, col, inside, D)
            out += tl.where((v == carried)[:, None], carry[None, :], 0.0)
            tl.store(to, (old.to(tl.float32) + out).to(dw.dtype.element_ty), mask=alone)
            into = sums + (2 * piece).to(tl.int64) * D + col[None, :] + 0 * v[:, None]
            tl.store(into, out, mask=(end & (v == before))[:, None] & inside[None, :])
            carry = tl.sum(tl.where((each == TOGETHER - 1)[:, None], out, 0.0), 0)
            carried = tl.max(v, 0)
            v, following, value, token = next_v, next_following, next_value, next_token
        if carried < V:
            _leave(dw, sums, carried, carry, before, after, piece, col, inside, D)


@triton.jit(do_not_specialize=("V", "D", "count"))
def spanning_kernel(
    classes, dw, sums, V, D, count,
    PIECE: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    """Adds up the sums of a class that spans pieces, in the program of the piece in which the class begins."""
    piece = tl.program_id(0)
    stop = (piece + 1) * PIECE
    v = tl.load(classes + stop - 1, mask=stop <= count, other=V)
    after = tl.load(classes + stop, mask=stop < count, other=-1)
    begins = tl.load(classes + piece * PIECE) != v
    if begins == 0:  # the piece holds one class only, which begins here unless the piece before ends with it
        begins = tl.load(classes + piece * PIECE - 1, mask=piece > 0, other=-1) != v
    if (v < V) & (v == after) & begins:
        col = tl.program_id(1) * BD + tl.arange(0, BD)
        inside = col < D
        acc = tl.load(sums + (2 * piece + 1).to(tl.int64) * D + col, mask=inside, other=0.0)
        at = piece + 1
        goes_on = True
        while goes_on:
            acc += tl.load(sums + (2 * at).to(tl.int64) * D + col, mask=inside, other=0.0)
            end = (at + 1) * PIECE
            last = tl.load(classes + end - 1, mask=end <= count, other=-1)
            beyond = tl.load(classes + end, mask=end < count, other=-1)
            goes_on = (last == v) & (beyond == v)
            at += 1
        _add_row(dw, v, col, inside, D, acc)


@lru_cache(maxsize=KEPT)
def _launches(device: torch.device, count: int, vocab: int, hidden: int, sh0: int) -> tuple[Launch, Launch]:
    width = min(triton.next_power_of_2(hidden), 256)
    grid = triton.cdiv(count, PIECE), triton.cdiv(hidden, width), 1
    bound = {"V": vocab, "D": hidden, "count": count, "sh0": sh0, "PIECE": PIECE, "TOGETHER": TOGETHER, "BD": width}
    return (
        Launch(piece_kernel, grid, bound | {"num_warps": 4, "num_stages": 1}),
        Launch(spanning_kernel, grid, bound | {"num_warps": 4}),
    )


def class_gradients(classes: Tensor, values: Tensor, tokens: Tensor, h: Tensor, dw: Tensor) -> None:
    """dw[class_j] += value_j h[token_j] for all entries j; classes [count] int32 in any order, V for no entry.

    ``count`` is a multiple of `PIECE`.
    """
    vocab, hidden = dw.shape
    ordered, order = torch.sort(classes, stable=True)
    pieces, spanning = _launches(h.device, len(classes), vocab, hidden, h.stride(0))
    sums = h.new_empty((2 * (len(classes) // PIECE), hidden), dtype=torch.float32)
    pieces.run(classes=ordered, order=order, values=values, tokens=tokens, h=h, dw=dw, sums=sums)
    spanning.run(classes=ordered, dw=dw, sums=sums)
