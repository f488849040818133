"""The list of marked entries: every mark of a row once, in the order of E8, the label last."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is published for Linux only")
if torch.cuda.is_available():
    pytest.skip("kernels are compiled here, not interpreted: tests/gpu", allow_module_level=True)

import float8_sweep

from fusedhead.kernels.triton_engine.float8.exponentials import FLOAT8_BLOCK, FLOAT8_PART, FLOAT8_TILE, Tail, padded
from fusedhead.kernels.triton_engine.float8.list_entries import count_entries, fill_entries

# numpy speaks up where a GPU stays silent
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")


def made(n: int, vocab: int, labels: int) -> tuple[Tail, torch.Tensor, list[list[int]]]:
    """A tail with marks, labels, and the marked classes of each row in the order of E8, its label left out."""
    draw = torch.Generator().manual_seed(n)
    shape = padded(n, FLOAT8_BLOCK), padded(vocab, FLOAT8_PART)
    values = torch.rand(shape, generator=draw) * 400
    marked = torch.rand(shape, generator=draw) < 0.02
    marked[:, vocab:], values[:, vocab:] = False, 0
    marked[1] = False
    marked[2, :vocab] = True
    order = float8_sweep.classes_in_order(vocab)
    rows = torch.where(marked, -1e-30, values).to(torch.float8_e4m3fn).view(torch.uint8)[:, order]
    y = torch.randint(0, vocab, (n, labels), generator=draw)
    parts = torch.nn.functional.pad(marked[:n], (0, -marked.shape[1] % FLOAT8_TILE)).view(n, -1, 3, FLOAT8_PART).any(3)
    parts |= torch.rand(parts.shape, generator=draw) < 0.1  # a part may only seem to hold one
    hot = (parts.int() @ torch.tensor([1, 2, 4], dtype=torch.int32)).to(torch.uint8)
    own = [set(row.tolist()) for row in y]
    listed = [[int(v) for v in order if marked[i, v] and int(v) not in own[i]] for i in range(n)]
    return Tail(rows.view(torch.float8_e4m3fn), torch.empty(0), hot), y, listed


@pytest.mark.parametrize(("n", "vocab", "labels"), [(20, 300, 1), (9, 1000, 0), (5, 7000, 1)])
def test_every_mark_is_listed_once(n, vocab, labels):
    tail, y, listed = made(n, vocab, labels)
    counts = torch.full((n,), -1, dtype=torch.int32)
    count_entries(tail, y, counts)
    assert counts.tolist() == [len(row) + labels for row in listed]
    counts[3] = 0  # a row without a gradient
    ends = counts.cumsum(0, dtype=torch.int32) + 5
    classes = torch.full((int(ends[-1]) + 3,), -1, dtype=torch.int32)
    fill_entries(tail, y, counts, ends, classes)
    expected = [-1] * 5
    for i, row in enumerate(listed):
        expected += [*row, *y[i].tolist()] if i != 3 else []
    assert classes.tolist() == [*expected, -1, -1, -1]


def test_rows_of_marked_token_blocks_alone_are_counted_again():
    tail, y, listed = made(20, 300, 1)
    counts = torch.full((20,), -1, dtype=torch.int32)
    count_entries(tail, y, counts, torch.tensor([0, 1, 0], dtype=torch.int32), 8)
    assert counts.tolist() == [len(row) + 1 if 8 <= i < 16 else -1 for i, row in enumerate(listed)]
