"""The layout of float8 exponentials in memory, and the launch of their sweep (`gluon.float8_exponentials`)."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from fusedhead.kernels.contract import Head
from fusedhead.kernels.triton_engine.launch.launch import Launch
from fusedhead.kernels.triton_engine.launch.sweep import KEPT, Sweep

FLOAT8_PART = 64  # columns of a part that the kernel stores; rows of E8 are padded to a multiple
FLOAT8_BLOCK = 128  # tokens of the kernel's tile; rows of E8T are padded to a multiple
FLOAT8_TILE = 192  # columns of the kernel's tile; one byte of `hot` each


def padded(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


class Tail(NamedTuple):
    """A window of float8 exponentials. `float8.quantize` gives the order of classes in E8 and of tokens in E8T."""

    rows: Tensor  # E8 [M', V'] e4m3: M and V padded to multiples of `FLOAT8_BLOCK` and `FLOAT8_PART`
    columns: Tensor  # E8T [V', >= M'] e4m3: the transpose, starting at the window's first token
    hot: Tensor  # [M, tiles] uint8: bit j if part j of a row's tile may hold an entry that was left out


@lru_cache(maxsize=KEPT)
def _launch(s: Sweep, only: bool, ld: int, ldt: int) -> Launch:
    from fusedhead.kernels.triton_engine.gluon.float8_exponentials import (
        float8_exp_pair_kernel,  # only where Gluon runs
    )

    return s.launch(float8_exp_pair_kernel, ONLY=only, ld=ld, ldt=ldt, tiles=-(-s.vocab // FLOAT8_TILE))


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
    """tail <- exponentials times gain [N]; part [1, size] <- totals; picked [N, K] <- logits at the labels."""
    h_tiles, w_tiles = s.operands(head.h, head.w, None)
    _launch(s, flags is not None, tail.rows.stride(0), tail.columns.stride(0)).run(
        h=h_tiles,
        w=w_tiles,
        E8=tail.rows.view(torch.uint8),
        E8T=tail.columns.view(torch.uint8),
        hot=tail.hot,
        y=head.y,
        label_map=label_map,
        flags=flags,
        ref2=ref2,
        gain=gain,
        picked=picked,
        part=part,
    )
