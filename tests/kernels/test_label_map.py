"""The label map: the bits of a tile are set for exactly the parts that hold a label. Kernels run in the interpreter."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is published for Linux only")
if torch.cuda.is_available():
    pytest.skip("kernels are compiled here, not interpreted: benchmarks/gpu_check.py", allow_module_level=True)

from fusedhead.kernels.triton_engine.launch.sweep import sweep
from fusedhead.kernels.triton_engine.rows.label_map import map_labels
from tests.kernels.interpreted import head


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("first", [0, 40])
def test_a_bit_is_set_for_each_part_with_a_label(k: int, first: int) -> None:
    x = head(n=50, v=4000, k=k)
    s = sweep("stream", x)
    bm, bn, parts = s.tile.BM, s.tile.BN, s.tile.parts
    expected = torch.zeros(s.schedule.blocks, -(-4000 // bn), dtype=torch.int32)
    for token, label in ((i, label - first) for i, labels in enumerate(x.y.tolist()) for label in labels):
        if label >= 0:
            expected[token // bm, label // bn] |= 1 << (label % bn // (bn // parts))
    assert torch.equal(map_labels(s, x.y, first), expected)
