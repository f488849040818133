"""The sweep of the float8 single pass in torch's own ops, for Triton's interpreter: what the pair of warps computes.

Takes the place of `float8.exponentials.float8_exponentials`; `test_float8_exponentials.py` compares the two.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fusedhead.kernels.contract import Head
from fusedhead.kernels.triton_engine.float8.exponentials import FLOAT8_BLOCK, FLOAT8_PART, FLOAT8_TILE, Tail, padded
from fusedhead.kernels.triton_engine.launch.sweep import Sweep

L = torch.tensor(1.4426950408889634, dtype=torch.float32).item()


def classes_in_order(count: int) -> Tensor:
    """The class at each place of a row of E8, [V']: 16 (v // 2 % 4) + 2 (v // 8) + v % 2 in each 64."""
    v = torch.arange(padded(count, FLOAT8_PART)).view(-1, 8, 4, 2)
    return v.permute(0, 2, 1, 3).reshape(-1)


def tokens_in_order(count: int) -> Tensor:
    """The token at each place of a row of E8T, [M']."""
    t = torch.arange(padded(count, FLOAT8_BLOCK)).view(-1, 2, 4, 2, 8)
    return t.permute(0, 2, 4, 1, 3).reshape(-1)


def float8_exponentials(
    s: Sweep,
    head: Head,
    tail: Tail,
    ref2: Tensor,
    gain: Tensor,
    picked: Tensor,
    part: Tensor,
    label_map: Tensor | None,
    flags: Tensor | None = None,
) -> None:
    (n, vocab), block = (len(head.h), len(head.w)), s.tile.BM
    z = head.h.float() @ head.w.float().t()
    e = (z.double() * L - ref2.double()[:, None]).float().exp2()
    x = e * gain[:, None]
    x = torch.where(x < 432, x, -1e-30)  # -0 once it is rounded
    whole = z.new_zeros((padded(n, FLOAT8_BLOCK), padded(vocab, FLOAT8_PART)))
    whole[:n, :vocab] = x
    x8 = whole.to(torch.float8_e4m3fn)
    sums = (
        torch.nn.functional.pad(e, (0, -vocab % FLOAT8_TILE)).view(n, -1, 3, FLOAT8_PART).sum(3) * gain[:, None, None]
    )
    bits = (~(sums < 432)).int() @ torch.tensor([1, 2, 4], dtype=torch.int32)
    everywhere = torch.ones(len(whole), dtype=torch.bool)  # rows past the end too, in whole token blocks
    if flags is not None:
        marked = (flags != 0).repeat_interleave(block)[: len(whole)]
        everywhere[: len(marked)], everywhere[len(marked) :] = marked, False
    redone = everywhere[:n]
    tail.rows[: len(whole)][everywhere] = x8.view(torch.uint8)[:, classes_in_order(vocab)].view(x8.dtype)[everywhere]
    order = tokens_in_order(n)
    columns = tail.columns[:, : len(whole)].view(torch.uint8)
    columns[:, everywhere[order]] = x8.view(torch.uint8)[order].t()[:, everywhere[order]]
    tail.hot[redone] = bits.to(torch.uint8)[redone]
    if picked.numel():
        picked[redone] = z.gather(1, head.y)[redone]
    _put_totals(s, e.sum(1), part, redone)


def slots_of(s: Sweep) -> Iterator[tuple[slice, list[int]]]:
    """(tokens of a block, where each slot of its partial totals begins), block by block (`device.schedule`)."""
    block, group = s.tile.BM, s.schedule.group
    blocks, tiles, programs = s.schedule.blocks, -(-s.vocab // s.tile.BN), s.schedule.programs
    tail = blocks % group
    main_rows, slots = (blocks - tail) * block, programs // group
    for at in range(blocks):
        main = at < blocks - tail
        distance = main_rows if main else tail * block
        first = at * block if main else slots * main_rows + (at - (blocks - tail)) * block
        count = slots if main else min(programs // max(tail, 1), tiles)
        yield slice(at * block, min((at + 1) * block, s.n)), [first + slot * distance for slot in range(count)]


def row_totals(s: Sweep, part: Tensor) -> Tensor:
    """The total of each row [N], summed over its slots in float64."""
    found = part.new_zeros(s.n, dtype=torch.float64)
    for rows, starts in slots_of(s):
        for start in starts:
            found[rows] += part[0, start : start + rows.stop - rows.start]
    return found


def _put_totals(s: Sweep, totals: Tensor, part: Tensor, redone: Tensor) -> None:
    """A row's total into its first slot, zeros into the others."""
    for rows, starts in slots_of(s):
        if redone[rows.start]:
            for start in starts:
                part[0, start : start + s.tile.BM] = 0
            part[0, starts[0] : starts[0] + rows.stop - rows.start] = totals[rows]
