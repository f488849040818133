"""Operands and labels that do not fit are refused with a sentence that names them."""

from __future__ import annotations

import pytest
import torch

from fusedhead.lowering.checks import LabelOutOfRange
from tests.lowering.heads import OPS, operands


@pytest.mark.parametrize("wrong", [-1, 50, 1 << 40])
def test_a_label_out_of_range_raises_what_eager_raises_and_names_it(wrong):
    o = operands(7, 50, 8)
    o.y[3, 0] = wrong
    assert {IndexError, RuntimeError} <= set(LabelOutOfRange.__mro__)
    with pytest.raises(LabelOutOfRange, match=rf"label {wrong} is out of range: labels must lie in \[0, 49\]"):
        OPS.head_stats(*o, "", "lse,picked", 0)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"w": torch.zeros(50, 9)}, "hidden size of h is 8 but the hidden size of w is 9"),
        ({"y": torch.zeros(6, 1, dtype=torch.int64)}, "labels is 6 but the number of tokens of h is 7"),
        ({"cols": torch.zeros(1, 49)}, "cols is 49 but the vocabulary of w is 50"),
        ({"rows": torch.zeros(1, 6)}, "rows is 6 but the number of tokens of h is 7"),
        ({"u": torch.zeros(49)}, "u is 49 but the vocabulary of w is 50"),
        ({"h": torch.zeros(2, 7, 8)}, "must be matrices"),
        ({"w": torch.zeros(50, 8, dtype=torch.float16)}, "h is torch.float32 and w is torch.float16"),
        ({"y": torch.zeros(7, 1, dtype=torch.int32)}, "labels are torch.int32"),
    ],
)
def test_operands_that_do_not_fit_are_named_with_their_sizes(change, sentence):
    o = operands(7, 50, 8, dtype=torch.float32)._replace(**change)
    with pytest.raises(ValueError, match=sentence):
        OPS.head_stats(*o, "", "lse", 0)


def test_a_step_or_statistic_that_is_not_known_is_named():
    o = operands(7, 50, 8)
    with pytest.raises(ValueError, match="'cosh' is not known"):
        OPS.head_stats(*o, "cosh", "lse", 0)
    with pytest.raises(ValueError, match="'median' is not known"):
        OPS.head_stats(*o, "", "lse,median", 0)
    with pytest.raises(ValueError, match="addcol:2 but only 2"):
        OPS.head_stats(*o, "addcol:2", "lse", 0)
