"""Row gradients: the last step of dh in the float8 single pass, a row factor and the row's listed entries in float32.

    dh[i] = tail_i · product[i] + Σ_j value_j w[class_j] value_j = s 2^(z·L - ref2)
    z = h_i · w[class_j] in float32 value of the label = s (own - stored + c_picked total / a)     own = 2^(picked·L -
    ref2), stored: its entry in E8 / gain

with s = a / total as in `rows.finalize`, and tail_i = s / gain · scale of the product. in: product [M, D] float32, h
[M, D], w [V, D] bfloat16, the list (`float8.list_entries`), row vectors float32 (below). out: dh [M, D] bfloat16;
values float32 and tokens int32 of the list, for dw (`float8.class_gradients`). Never in memory: dz, a gathered copy of
w. FLOP MD, and 4D an entry; bytes: 8MD, and 2D an entry, whose row of w is read once for z and for the sum. As p -> 1
the label's value keeps its digits, as in `rows.finalize`.
"""

from __future__ import annotations

from functools import lru_cache

import triton
import triton.language as tl
from torch import Tensor

from fusedhead.kernels.contract import Head, RowGrads
from fusedhead.kernels.triton_engine.constants import LOG2E
from fusedhead.kernels.triton_engine.device.schedule import partial_offset
from fusedhead.kernels.triton_engine.float8.exponentials import Tail
from fusedhead.kernels.triton_engine.float8.quantize import place_of
from fusedhead.kernels.triton_engine.launch.launch import Launch
from fusedhead.kernels.triton_engine.launch.sweep import KEPT, Sweep


@triton.jit(do_not_specialize=("first_token", "N", "V", "D", "P", "GROUP", "sy0"))
def row_gradient_kernel(
    product,  # [N, D] float32
    tail,  # [N] float32
    h,  # [N, D]
    w,  # [V, D]
    y,  # [N, K] int64 when LABELS
    E8,  # [., ld] e4m3, read when LABELS
    ref2,  # [N] float32
    gain,  # [N] float32
    picked,  # [N, K] float32
    part,  # [size] float32: totals
    scale,  # [N] float32
    lse,  # [N] float32
    c_lse,  # [N] float32 when HAS_LSE
    c_picked,  # [N, K] float32 when HAS_PICKED
    c_square,  # [N] float32 when HAS_SQUARE
    counts,  # [N] int32
    ends,  # [N] int32
    classes,  # [.] int32
    values,  # [.] float32, out
    tokens,  # [.] int32, out: first_token + row
    out,  # [N, D]
    first_token,
    N,
    V,
    D,
    P,
    GROUP,
    sh0,
    sw0,
    sy0,
    ld,
    LABELS: tl.constexpr,
    HAS_LSE: tl.constexpr,
    HAS_PICKED: tl.constexpr,
    HAS_SQUARE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    SLOTS: tl.constexpr,
    WIDTH: tl.constexpr,  # D, rounded up to a power of two
):
    """One program a row."""
    row = tl.program_id(0)
    at = row.to(tl.int64)
    col = tl.arange(0, WIDTH)
    inside = col < D
    count = tl.load(counts + row)
    end = tl.load(ends + row)
    s = tl.load(scale + row)
    r = tl.load(ref2 + row)
    x = tl.load(h + at * sh0 + col, mask=inside, other=0.0).to(tl.float32)
    acc = tl.load(product + at * D + col, mask=inside, other=0.0) * tl.load(tail + row)
    here = tl.load(classes + end - count, mask=count > 0, other=0)
    row_of_w = tl.load(w + here.to(tl.int64) * sw0 + col, mask=col < tl.where(count > 0, D, 0), other=0.0)
    for j in range(end - count, end):
        # load the next row of w before this one is used
        more = end > j + 1
        here = tl.load(classes + j + 1, mask=more, other=0)
        next_row = tl.load(w + here.to(tl.int64) * sw0 + col, mask=col < tl.where(more, D, 0), other=0.0)
        v = row_of_w.to(tl.float32)
        value = s * tl.exp2(tl.fma(tl.sum(x * v, 0), LOG2E, -r))
        if LABELS > 0:  # noqa: SIM102 (a test at compile time)
            if more == 0:
                label = tl.load(y + at * sy0).to(tl.int32)
                own = tl.exp2(tl.fma(tl.load(picked + row), LOG2E, -r))
                stored = tl.load(E8 + at * ld + label // 64 * 64 + place_of(label % 64)).to(tl.float32)
                entry = own - stored / tl.load(gain + row)
                if HAS_PICKED:
                    block = row // BM
                    start, distance, slots = partial_offset(block, 0, P, N, V, GROUP, BM, BN)
                    totals = tl.zeros((SLOTS,), tl.float32)
                    for first in range(0, slots, SLOTS):
                        slot = first + tl.arange(0, SLOTS)
                        there = start.to(tl.int64) + slot.to(tl.int64) * distance + (row - block * BM)
                        totals += tl.load(part + there, mask=slot < slots, other=0.0)
                    total = tl.sum(totals, 0)
                    c = tl.load(c_picked + row)
                    a = 0.0
                    if HAS_LSE:
                        a += tl.load(c_lse + row)
                    if HAS_SQUARE:
                        a += 2.0 * tl.load(c_square + row) * tl.load(lse + row)
                    # for a cross-entropy c / a is exactly -1, so that entry - total is rounded only once
                    value = tl.where(a == 0.0, c, s * (entry + c / a * total))
                else:
                    value = s * entry
        tl.store(values + j, value)
        tl.store(tokens + j, first_token + row)
        acc += value * v
        row_of_w = next_row
    tl.store(out + at * D + col, acc.to(out.dtype.element_ty), mask=inside)


@lru_cache(maxsize=KEPT)
def _launch(s: Sweep, ld: int, given: tuple[bool, bool, bool]) -> Launch:
    width = triton.next_power_of_2(s.hidden)
    warps = 8 if width > 4096 else 4 if width > 1024 else 2
    has_lse, has_picked, has_square = given
    picked = has_picked and s.labels > 0
    own = {"HAS_LSE": has_lse, "HAS_PICKED": picked, "HAS_SQUARE": has_square, "WIDTH": width}
    bound = s.arguments(ld=ld, **own, num_warps=warps)
    return Launch(row_gradient_kernel, (s.n, 1, 1), bound)


def row_gradients(
    s: Sweep,
    head: Head,
    window: Tail,
    product: Tensor,
    tail: Tensor,
    ref2: Tensor,
    gain: Tensor,
    picked: Tensor,
    part: Tensor,
    scale: Tensor,
    lse: Tensor,
    c: RowGrads,
    counts: Tensor,
    ends: Tensor,
    classes: Tensor,
    values: Tensor,
    tokens: Tensor,
    out: Tensor,
    first_token: int,
) -> None:
    """out [M, D] <- dh; values, tokens [capacity] <- those of the listed entries; ``first_token`` is the window's."""
    labels = s.labels > 0
    given = c.lse is not None, c.picked is not None, c.square is not None
    _launch(s, window.rows.stride(0), given).run(
        product=product,
        tail=tail,
        h=head.h,
        w=head.w,
        y=head.y if labels else None,
        E8=window.rows if labels else None,
        ref2=ref2,
        gain=gain,
        picked=picked if labels else None,
        part=part,
        scale=scale,
        lse=lse,
        c_lse=c.lse,
        c_picked=c.picked if labels else None,
        c_square=c.square,
        counts=counts,
        ends=ends,
        classes=classes,
        values=values,
        tokens=tokens,
        out=out,
        first_token=first_token,
    )
