"""A window of exponentials by torch ops: kept whole or block by block, it gives the same sums and gradients."""

from __future__ import annotations

import pytest
import torch

from fusedhead.kernels.contract import Head, Needs, RowGrads, Windows
from fusedhead.kernels.torch_engine.block_window import BlockWindow, RowScale
from fusedhead.kernels.torch_engine.blocks import label_cells
from fusedhead.kernels.torch_engine.exponentials import level_at
from fusedhead.kernels.torch_engine.gradient_sink import Sink
from fusedhead.kernels.transform.transform import parse
from tests.lowering.heads import MULTIPLIED, multiplies, operands

N, D, V = 24, 16, 1300
NEEDS = Needs(True, True, False, False)


@pytest.mark.parametrize(("dtype", "products"), MULTIPLIED[:3])
@pytest.mark.parametrize("transform", ["", "mul:0.5", "tanh"])
def test_blocks_go_to_the_gradients_at_once_or_out_of_a_kept_window(monkeypatch, dtype, products, transform):
    multiplies(monkeypatch, dtype, products)
    torch.manual_seed(0)
    o = operands(N, V, D, dtype=dtype, u=False)
    head, i, windows = Head(*o, parse(transform)), slice(0, N), Windows(N, V, torch.float32)
    s, t = torch.rand(N), torch.zeros(N, 1)
    level, cells, h = level_at(head, torch.zeros(N), False), label_cells(head, i), head.h.to(products)
    results = []
    for keep in (False, True):
        sink, window = Sink(head, RowGrads(), NEEDS, windows), BlockWindow(head, NEEDS, windows, keep)
        parts = window.exponentials(i, h, level, cells, None if keep else RowScale(s, sink))
        window.gradients(i, h, s, t, sink)
        grads = sink.finish()
        assert grads.h is not None
        assert grads.w is not None
        results.append((torch.stack(parts).sum(0), grads.h.float(), grads.w.float()))
    for a, b in zip(*results):
        assert (a - b).norm() <= (1e-6 if dtype == torch.float32 else 0.01) * b.norm()
