"""Augmented assignments to a part of the logits become a write to the whole, unless the part is read afterwards."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.eager_stack import Rewritten
from tests.rules import partial_writes
from tests.rules.diffusion import B, D, Model, T, gradients

UPDATES = [
    partial_writes.added,
    partial_writes.subtracted_from_several,
    partial_writes.scaled,
    partial_writes.written_through_a_view,
    partial_writes.normalised_by_hand,
    partial_writes.read_before,
    partial_writes.another_name,
    partial_writes.one_token,
]


def edits(after: Callable[[Tensor], Tensor]) -> int:
    """The edits of the pass, once the gradients are shown to be those of eager code."""
    model, x = Model(after), torch.randn(B, T, D)
    run = Rewritten(model)
    torch.testing.assert_close(gradients(model, run(x)), gradients(model, model(x)), rtol=1e-4, atol=1e-6)
    return sum(each.edits for each in run.report.passes if each.name == "functionalize-subscripts")


@pytest.mark.parametrize("after", UPDATES)
def test_an_update_of_some_classes_is_a_write_to_all(after: Callable[[Tensor], Tensor]) -> None:
    assert edits(after) > 0


def test_an_update_whose_part_is_read_afterwards_stays() -> None:
    assert edits(partial_writes.read_again) == 0


def test_an_assignment_is_no_update() -> None:
    assert edits(partial_writes.set_to_infinity) == 0
