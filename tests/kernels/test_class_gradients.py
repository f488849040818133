"""Listed entries added up by class: every way in which a class can lie in pieces."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is published for Linux only")
if torch.cuda.is_available():
    pytest.skip("kernels are compiled here, not interpreted: tests/gpu", allow_module_level=True)

from fusedhead.kernels.triton_engine.float8.class_gradients import PIECE, class_gradients
from tests.kernels.interpreted import error

# numpy speaks up where a GPU stays silent
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")


def test_classes_with_any_number_of_entries_are_added_up():
    """None, some, a whole piece, several pieces, and what begins and ends within them."""
    n, d, vocab = 64, 24, 40
    counts = [0, 3, PIECE - 3, 2, 1, 2 * PIECE + 7, PIECE, 5, 1, 1, PIECE - 14, 4 * PIECE, 6]
    classes = torch.cat([torch.full((count,), 2 * at) for at, count in enumerate(counts)])
    room = -(-len(classes) // PIECE) * PIECE + PIECE
    classes = torch.cat((classes, torch.full((room - len(classes),), vocab)))
    order = torch.randperm(room)
    classes = classes[order].int()
    values, tokens = torch.randn(room), torch.randint(0, n, (room,), dtype=torch.int32)
    h, dw = torch.randn(n, d), torch.randn(vocab, d)
    there = classes < vocab
    want = dw.double().index_add(0, classes[there].long(), (values[:, None] * h[tokens.long()])[there].double())
    class_gradients(classes, values, tokens, h, dw)
    assert error(dw, want) < 1e-6
