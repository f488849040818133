"""Blocks of exponentials of the torch engine: pieces of rows give what whole blocks give."""

from __future__ import annotations

import pytest
import torch

from fusedhead.kernels.torch_engine import blocks, exponentials
from tests.lowering.heads import OPS, operands

TRANSFORMS = (
    "",
    "mul:0.5",
    "addcol:0",
    "mul:0.0333 tanh mul:30.0",
    "mulrow:0 addcol:0 sigmoid mulcol:1 addrow:0 add:0.25",
)


@pytest.mark.parametrize("transform", TRANSFORMS[2:])
def test_rows_taken_in_pieces_give_what_the_whole_block_gives(monkeypatch, transform, multiplied):
    dtype, _ = multiplied
    """Also where labels stand in some pieces only."""
    o = operands(131, 1507, 23, 3, dtype=dtype)
    o.y[:64] = o.y[:64] % 700
    c, e = torch.rand(131), torch.empty(0)
    results = []
    for size in (blocks.PIECE_BYTES, 1 << 14):
        monkeypatch.setattr(blocks, "PIECE_BYTES", size)
        arguments = (*o, c, -c[:, None].expand(-1, 3).contiguous(), e, e, transform, "lse,picked", 0)
        results.append(OPS.head_loss(*arguments, True, True, False, False))
    for whole, pieces in zip(*results):
        torch.testing.assert_close(pieces, whole)


@pytest.mark.parametrize("transform", TRANSFORMS[2:])
def test_statistics_alone_take_no_derivative_of_the_logits(monkeypatch, transform):
    o = operands(131, 1507, 23, 3)
    slopes: list[torch.Size] = []
    pull_back = exponentials.pull_back
    monkeypatch.setattr(exponentials, "pull_back", lambda *args: slopes.append(args[1].shape) or pull_back(*args))
    OPS.head_stats(*o, transform, "lse,picked", 0)
    assert {shape[1] for shape in slopes} <= {3}  # those of the labels
