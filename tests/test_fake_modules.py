"""Fake parameters take the places of real ones, wherever a function holds its modules, and leave without a trace."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from fusedhead.fake_modules import fake_modules, faked, modules_of

GLOBAL = nn.Linear(2, 2)


class Owner:
    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def method(self, x: Tensor) -> Tensor:
        return GLOBAL(x)


def reads_a_global(x: Tensor) -> Tensor:
    return GLOBAL(x)


def forms(module: nn.Module) -> dict[str, Any]:
    def closure(x: Tensor) -> Tensor:
        return module(x)

    return {
        "itself": module,
        "closure": closure,
        "partial": partial(closure, x=1),
        "argument of a partial": partial(lambda m, x: m(x), module),
        "method of it": module.forward,
        "list": [1, (module,)],
        "dictionary": {"model": module},
    }


@pytest.mark.parametrize("form", forms(nn.Identity()))
def test_modules_are_found_where_functions_hold_them(form: str) -> None:
    module = nn.Linear(2, 2)
    assert module in modules_of(forms(module)[form])


@pytest.mark.parametrize("function", [reads_a_global, Owner(nn.Identity()).method])
def test_modules_that_a_function_names_are_found(function: Callable[[Tensor], Tensor]) -> None:
    assert GLOBAL in modules_of(function)


def test_an_empty_cell_and_a_circle_are_no_obstacle() -> None:
    def closure() -> Any:
        return later

    modules = modules_of(closure)  # `later` is not bound yet
    later: list[Any] = [nn.Identity()]
    later.append(later)
    assert (modules, modules_of(later)) == ([], [later[0]])


def test_real_parameters_are_back_at_the_end_also_after_an_error() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    before = dict([*model.named_parameters(), *model.named_buffers()])

    def fails_inside() -> None:
        with fake_modules([model], FakeTensorMode()):
            assert all(isinstance(value.data, FakeTensor) for value in model.parameters())
            raise RuntimeError("in between")

    with pytest.raises(RuntimeError, match="in between"):
        fails_inside()
    after = dict([*model.named_parameters(), *model.named_buffers()])
    assert all(after[name] is value for name, value in before.items())


def test_tied_weights_stay_tied_and_frozen_ones_frozen() -> None:
    first, second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    second.weight = first.weight
    first.weight.requires_grad_(False)
    with fake_modules([first, second], FakeTensorMode()):
        assert first.weight is second.weight
        assert not first.weight.requires_grad


def test_a_fake_has_the_layout_and_no_numbers() -> None:
    value = torch.ones(3, 4, dtype=torch.bfloat16).t().requires_grad_()
    fake = faked(value, FakeTensorMode())
    assert isinstance(fake, FakeTensor)
    assert (fake.shape, fake.stride(), fake.dtype, fake.requires_grad) == (
        value.shape, value.stride(), value.dtype, True,
    )  # fmt: skip
    assert faked(3, None) == 3
