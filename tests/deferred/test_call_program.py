"""Call programs: arguments as keys, programs joined without equal steps, sizes up to a renaming."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fusedhead.deferred.call_program import (
    CallProgram,
    CallStep,
    Leaf,
    Made,
    Mode,
    Unreadable,
    decode,
    encode,
    joined,
    modes,
    relocated,
    shapes,
)

PLAIN = Mode(True, None)
NONE = encode({}, lambda _: Leaf(0))


def step(func: Any, *args: Any, mode: Mode = PLAIN) -> CallStep:
    """A step whose arguments are references and constants."""
    return CallStep(func, encode_references(args), NONE, mode)


def encode_references(args: tuple[Any, ...]) -> Any:
    stand_ins = {at: torch.empty(0) for at, arg in enumerate(args) if isinstance(arg, (Leaf, Made))}
    references = {id(tensor): args[at] for at, tensor in stand_ins.items()}
    return encode(tuple(stand_ins.get(at, arg) for at, arg in enumerate(args)), lambda tensor: references[id(tensor)])


@pytest.mark.parametrize(
    "value",
    [
        (1, 1.0, True, "mean", None, ..., torch.float32, torch.device("cpu")),
        [slice(1, None, 2), (slice(None), [3, 4])],
        {"dim": -1, "dtype": None},
        torch.Size([2, 3]),
    ],
)
def test_decoding_gives_what_was_encoded(value: Any) -> None:
    code = encode(value, lambda _: Leaf(0))
    hash(code)
    assert decode(code, lambda leaf: leaf) == value


def test_numbers_of_other_types_are_other_arguments() -> None:
    codes = {encode(value, lambda _: Leaf(0)) for value in (1, 1.0, True)}
    assert len(codes) == 3


def test_an_argument_that_no_key_can_hold_is_refused() -> None:
    with pytest.raises(Unreadable, match="an argument of type set"):
        encode((1, {2}), lambda _: Leaf(0))


def test_tensors_become_references_that_can_be_moved() -> None:
    x, y = torch.ones(1), torch.ones(2)
    code = encode((x, [y, x], 3), lambda tensor: Leaf(tensor.numel() - 1))
    assert decode(code, lambda leaf: leaf.at) == (0, [1, 0], 3)
    moved = relocated(code, (Made(4, 1), Leaf(7)), ())
    assert decode(moved, tuple) == ((4, 1), [(7,), (4, 1)], 3)


def test_a_program_runs_each_step_in_its_own_mode() -> None:
    program = CallProgram((step(torch.exp, Leaf(0)), step(torch.sin, Made(0), mode=Mode(False, None))), Made(1))
    x = torch.randn(3, requires_grad=True)
    result = program(x)
    torch.testing.assert_close(result, x.exp().sin())
    assert not result.requires_grad


def test_joined_programs_share_equal_steps() -> None:
    first = CallProgram((step(torch.exp, Leaf(0)), step(torch.sin, Made(0))), Made(1))
    second = CallProgram((step(torch.exp, Leaf(0)), step(torch.cos, Made(0))), Made(1))
    steps, results = joined([(first, (Leaf(0),)), (second, (Leaf(0),))])
    assert [each.func for each in steps] == [torch.exp, torch.sin, torch.cos]
    assert results == [Made(1), Made(2)]
    steps, _ = joined([(first, (Leaf(0),)), (second, (Leaf(1),))])  # of another tensor
    assert len(steps) == 4


def test_sizes_count_only_by_which_of_them_are_equal() -> None:
    def key(*sizes: tuple[int, ...]) -> Any:
        return shapes([torch.empty(size) for size in sizes], frozenset({0, 1, 8}))

    assert key((4, 8), (4,)) == key((6, 8), (6,))
    assert key((4, 8), (4,)) != key((6, 8), (5,))
    assert key((4, 8), (4,)) != key((4, 7), (4,))
    assert shapes([torch.empty(4)], None) != shapes([torch.empty(6)], None)


def test_modes_are_those_that_were_recorded() -> None:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        mode = Mode.now("cpu")
    assert mode == Mode(False, torch.bfloat16)
    with modes(mode, "cpu"):
        assert Mode.now("cpu") == mode
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    x: Tensor = torch.ones(2, 2)
    assert (x @ x).dtype == torch.float32
