"""The tables of torch's functions: every name is one of torch's, and a call is put where its schema says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fusedhead.deferred import op_tables
from fusedhead.deferred.op_tables import METADATA, OUT_OF_PLACE, fails_at_once, lazy, may_write_argument, put_off

OWNERS = (Tensor, torch, F, torch.nested, torch.Tensor.untyped_storage, torch._C)
TABLES = ("LAZY", "PUT_OFF", "ALIKE", "FRESH", "_WITH_INPLACE_ARGUMENT")


@pytest.mark.parametrize("table", TABLES)
def test_every_name_is_one_of_torchs(table: str) -> None:
    assert not [name for name in getattr(op_tables, table) if not any(hasattr(owner, name) for owner in OWNERS)]


def test_metadata_is_answered_by_a_tensor_without_numbers() -> None:
    empty = torch.empty(2, 3, device="meta")
    for get in METADATA:
        if getattr(get, "__name__", "") == "__get__":
            get(empty)


@pytest.mark.parametrize(
    ("call", "args", "kwargs", "writes"),
    [
        (Tensor.mul_, (), {}, True),
        (Tensor.__setitem__, (0, 1.0), {}, True),
        (Tensor.__iadd__, (1.0,), {}, True),
        (torch.add, (1.0,), {"out": torch.empty(2)}, True),
        (F.relu, (True,), {}, True),
        (F.relu, (), {"inplace": True}, True),
        (F.relu, (False,), {}, False),
        (Tensor.mul, (2.0,), {}, False),
        (Tensor.__len__, (), {}, False),
        (Tensor.retain_grad, (), {}, True),
    ],
)
def test_a_call_that_may_write_is_told_from_one_that_does_not(
    call: Callable[..., Any], args: tuple, kwargs: dict[str, Any], writes: bool
) -> None:
    assert may_write_argument(call, (torch.ones(2), *args), kwargs) == writes


@pytest.mark.parametrize("name", sorted(OUT_OF_PLACE.keys() - {"float_", "half_", "bfloat16_"}))
def test_a_write_stands_for_the_function_that_gives_its_numbers(name: str) -> None:
    x = torch.rand(3) + 0.5
    by_name: dict[str, tuple] = {"masked_fill_": (x > 1, 0.0), "clamp_": (0.6, 1.0)}
    binary = {"add", "sub", "mul", "div", "true_divide", "iadd", "isub", "imul", "itruediv"}
    args = by_name.get(name, (2.0,) if name.strip("_") in binary else ())
    expected, written = OUT_OF_PLACE[name](x, *args), x.clone()
    getattr(written, name)(*args)
    assert torch.equal(written, expected)


def test_an_index_without_an_entry_is_an_error_now_as_in_eager_code() -> None:
    z = torch.zeros(3, 5)
    assert fails_at_once(torch.index_select, (z, 1, torch.tensor([5])))
    assert not fails_at_once(torch.index_select, (z, 1, torch.tensor([4])))
    assert fails_at_once(torch.index_select, (z, 1, torch.tensor([1.0])))
    assert fails_at_once(Tensor.__getitem__, (z, torch.tensor([-4])))
    assert fails_at_once(Tensor.__and__, (z, z))
    assert not fails_at_once(Tensor.__and__, (z > 0, z > 0))


def test_steps_that_rules_follow_are_recorded_and_others_put_off_or_computed() -> None:
    assert lazy(Tensor.view)
    assert lazy(Tensor.T.__get__)
    assert put_off(torch.softmax)
    assert not lazy(Tensor.cumsum)
    assert not put_off(Tensor.cumsum)
