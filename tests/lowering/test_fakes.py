"""The shapes and dtypes that tracing sees are those that the ops give."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.lowering.heads import OPS, Operands, none, operands

DTYPES = (torch.float64, torch.float32, torch.bfloat16)
STATS = ("lse", "lse,picked", "picked", "lse,sum,spread", "entropy", "variance,max,argmax", "lse,lse_low,picked,sum")


def forms(results: tuple) -> list[tuple]:
    return [(tuple(x.shape), x.dtype, x.device.type) for x in results]


def both(op: object, inputs: tuple) -> tuple[list[tuple], list[tuple]]:
    """The forms of an op's results, of tensors and of fakes."""
    mode = FakeTensorMode()
    fakes = tuple(mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in inputs)
    with mode:
        traced = op(*fakes)  # type: ignore[operator]
    return forms(op(*inputs)), forms(traced)  # type: ignore[operator]


def head(dtype: torch.dtype, labels: int = 2) -> Operands:
    return operands(9, 70, 8, labels, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stats", STATS)
def test_of_statistics(stats: str, dtype: torch.dtype) -> None:
    real, traced = both(OPS.head_stats, (*head(dtype), "", stats, 0))
    assert real == traced


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("whole_below", [0, 10**6])
def test_of_a_product_that_is_kept(whole_below: int, keep: bool) -> None:
    real, traced = both(OPS.head_stats, (*head(torch.float32), "", "lse", 0, whole_below, keep))
    assert real == traced


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=4)))
def test_of_a_loss(needs: tuple[bool, ...], dtype: torch.dtype) -> None:
    o = head(dtype, 1)
    c, e = torch.ones(9, dtype=none(o.h).dtype), none(o.h)
    inputs = (*o, c, -c[:, None], e, e, "addcol:0 mulcol:1 addrow:0", "lse,picked", 0, *needs)
    real, traced = both(OPS.head_loss, inputs)
    assert real == traced
