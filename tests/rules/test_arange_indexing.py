"""An entry of every row by index, ``lp[arange(N), y]``: fused where rows are counted, left alone where they are not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.programs.claims import B, D, Program, T, V, hidden, labels, left, right, weight

N = 6


def log_probs(h: Tensor, w: Tensor) -> Tensor:
    return F.log_softmax(F.linear(h, w), -1)


COUNTED = {
    "arange": lambda h, w, y: log_probs(h, w)[torch.arange(len(y)), y].mean(),
    "arange from 0": lambda h, w, y: log_probs(h, w)[torch.arange(0, y.shape[0], 1), y].sum(),
    "range": lambda h, w, y: log_probs(h, w)[range(len(y)), y].mean(),
    "a list": lambda h, w, y: log_probs(h, w)[list(range(len(y))), y].mean(),
    "labels from the end": lambda h, w, y: log_probs(h, w)[torch.arange(len(y)), y - V].mean(),
    "one sequence after the other": lambda h, w, y: sum(
        lp[torch.arange(3), y.view(2, 3)[i]].sum() for i, lp in enumerate(log_probs(h.view(2, 3, D), w))
    ),
}
OTHERWISE = {
    "another order": lambda h, w, y: log_probs(h, w)[torch.arange(N).flip(0), y].mean(),
    "from the second on": lambda h, w, y: log_probs(h, w)[torch.arange(1, N + 1) - 1, y].mean(),
    "a list in another order": lambda h, w, y: log_probs(h, w)[[1, 0, *range(2, N)], y].mean(),
    "every second one": lambda h, w, y: log_probs(h, w)[torch.arange(0, 2 * N, 2) // 2, y].mean(),
}


@pytest.mark.parametrize("program", COUNTED.values(), ids=COUNTED)
def test_the_entry_of_each_row_is_gathered(program: Program) -> None:
    right(program, hidden(N, D), weight(), labels(N))


def test_rows_of_two_dimensions_are_counted_in_each() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return log_probs(h, w)[torch.arange(B)[:, None], torch.arange(T)[None], y].mean()

    right(program, hidden(), weight(), labels(B, T))


@pytest.mark.parametrize("program", OTHERWISE.values(), ids=OTHERWISE)
def test_rows_in_any_other_order_are_left_alone(program: Program) -> None:
    left(program, hidden(N, D), weight(), labels(N), because="not counted by an arange")


def test_a_count_that_is_written_to_is_none() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        rows = torch.arange(N)
        rows.view(-1)[2] = 0
        return log_probs(h, w)[rows, y].mean()

    left(program, hidden(N, D), weight(), labels(N), because="not counted by an arange")


def test_a_label_past_the_end_is_an_error_as_in_eager_code() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return log_probs(h, w)[torch.arange(N), y].mean()

    for label in (V, -V - 1):
        with pytest.raises((IndexError, RuntimeError)):
            right(program, hidden(N, D), weight(), torch.full((N,), label))
