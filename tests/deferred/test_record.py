"""Recorded calls: the programs of a call are kept for the next batch, and picked rows are read by their numbers."""

from __future__ import annotations

from unittest.mock import patch

import torch
from torch import Tensor

from fusedhead.deferred import record
from fusedhead.deferred.call_program import CallProgram, CallStep, Container, Leaf, Made, Mode
from fusedhead.deferred.row_picks import Pick
from tests.deferred.heads import Model, V, deferring, is_deferred, tokens

PLAIN = Mode(True, None)
NONE = Container(dict, ())


def doubled() -> CallProgram:
    """z -> z + z of its one leaf."""
    step = CallStep(torch.add, Container(tuple, (Leaf(0), Leaf(0))), NONE, PLAIN)
    return CallProgram((step,), Made(0))


def test_picked_rows_are_a_choice_by_tensors_of_numbers() -> None:
    z = torch.randn(4, 6, 3)
    program = record.picking(doubled(), 1, [Pick(1, range(1, 6, 2), False), Pick(0, range(2, 3), True)], PLAIN)
    assert torch.equal(program(z, torch.tensor([1, 3, 5]), torch.tensor([2])), (2 * z)[2, 1:6:2])
    assert [step.func for step in program.steps] == [
        torch.add,
        Tensor.index_select,
        Tensor.index_select,
        Tensor.squeeze,
    ]


def test_the_numbers_of_picked_rows_may_be_saved_for_a_gradient() -> None:
    with torch.inference_mode():
        rows = record.index(range(5, 0, -2), torch.device("cpu"))
    assert rows.tolist() == [5, 3, 1]
    assert not rows.is_inference()


def test_the_next_batch_finds_the_programs_of_the_same_call(model: Model) -> None:
    compiled = deferring(model)
    with patch.object(record, "programs_of", wraps=record.programs_of) as made:
        views = [compiled(x).view(-1, V) for x in (tokens(), tokens())]
    assert made.call_count == 1
    assert all(map(is_deferred, views))
    first, second = (view._deferred for view in views)  # type: ignore[attr-defined]
    assert first.program is second.program
    assert first.leaves[0] is not second.leaves[0]


def test_logits_of_another_batch_have_the_layout_of_that_batch(model: Model) -> None:
    compiled = deferring(model, dynamic=True)
    for rows in (2, 3):
        x = tokens(rows)
        halves = compiled(x).half()
        assert is_deferred(halves)
        assert (halves.shape[0], halves.dtype) == (rows, torch.float16)
        torch.testing.assert_close(halves + 0, model(x).half())


def test_each_part_of_a_call_with_several_results_is_deferred(model: Model) -> None:
    x = tokens()
    parts = deferring(model)(x).unbind(0)
    assert all(map(is_deferred, parts))
    torch.testing.assert_close(parts[1] + 0, model(x)[1])
