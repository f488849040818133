"""Heads, tiles and modules for the kernels of two warpgroups, run on the CPU by `gluon_on_cpu`."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is published for Linux only")
gluon = pytest.importorskip("triton.experimental.gluon", reason="pairs are written in Gluon")


from fusedhead.kernels.contract import Head  # noqa: E402
from fusedhead.kernels.transform.transform import parse  # noqa: E402
from fusedhead.kernels.triton_engine.device import rows, schedule  # noqa: E402
from fusedhead.kernels.triton_engine.gluon import (  # noqa: E402
    dlogits,
    exponentials,
    ring,
    statistics,
    tile,
)
from fusedhead.kernels.triton_engine.launch.sweep import Sweep, sweep  # noqa: E402
from fusedhead.kernels.triton_engine.launch.tiles import Tile  # noqa: E402

MODULES = (ring, tile, exponentials, statistics, dlogits, rows, schedule)

SHAPES = (  # tokens, vocabulary, hidden, token blocks side by side, stages, labels
    (200, 500, 200, 1, 4, 1),  # a tile and a token block that are not whole, a step over D too
    (300, 1152, 64, 3, 2, 1),  # one step over D; whole tiles
    (700, 600, 130, 4, 3, 3),  # token blocks that do not fill a group
    (90, 200, 100, 1, 4, 0),  # fewer tiles than groups of warps
)


def made(n: int, v: int, d: int, k: int) -> Head:
    draw = torch.Generator().manual_seed(n)
    h, w = (torch.randn(m, d, generator=draw).to(torch.bfloat16) for m in (n, v))
    y = torch.randint(0, v, (n, k), generator=draw)
    nothing = torch.empty(0)
    return Head(h, w / d**0.5, y, nothing[None], nothing[None], nothing, parse(""))


def swept(kernel: str, head: Head, group: int, stages: int) -> tuple[Sweep, dict[str, object], int]:
    """The sweep in pairs, the arguments that it binds, its programs."""
    s = sweep(kernel, head, tile=Tile(128, 192, 64, group, 4, stages, False, 3, 2, True))
    return s, s.arguments(STAGES=stages, ONLY=False), -(-s.schedule.programs // 2)
