"""Labels are blanked in the block that they stand in, whether or not the host may look at them."""

from __future__ import annotations

import pytest
import torch

from fusedhead.kernels.contract import Head
from fusedhead.kernels.torch_engine.blocks import blank_labels, cuts, label_blanks, label_cells
from fusedhead.kernels.transform.transform import Transform

N, V = 40, 300


@pytest.mark.parametrize("host_looks", [True, False])
@pytest.mark.parametrize("labels", [0, 1, 3])
def test_exactly_the_cells_of_the_labels_are_blanked(labels: int, host_looks: bool) -> None:
    none, y = torch.empty(0), torch.randint(0, V, (N, labels))
    y[:2] = torch.tensor([0, V - 1])[:, None]  # the first and the last column, and equal labels in a row
    window = slice(0, N - 3)
    head = Head(torch.zeros(N, 1), torch.zeros(V, 1), y, none, none, none, Transform())
    cells = label_cells(head, window)
    z = torch.ones(N - 3, V)
    for v in cuts(V, 64):
        blanks = label_blanks(cells if host_looks else cells._replace(column_list=None), v)
        for r in cuts(N - 3, 15):
            blank_labels(z[r, v], blanks, r)
    assert torch.equal(z, torch.ones(N - 3, V).scatter_(1, y[window], 0))
