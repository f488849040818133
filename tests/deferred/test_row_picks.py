"""Row picks by constants: the positions that a call picks are those of torch's own indexing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fusedhead.deferred.row_picks import Pick, picks

SHAPE = (4, 6, 3)
Z = torch.arange(4 * 6 * 3).reshape(SHAPE)
CALLS: dict[str, tuple[Callable[..., Any], tuple]] = {
    "split": (torch.split, (4, 1)),
    "split in lists": (torch.split, ([1, 3], 0)),
    "split_with_sizes": (torch.split_with_sizes, ([2, 4], 1)),
    "chunk": (torch.chunk, (4, 1)),
    "unbind": (torch.unbind, (0,)),
    "narrow": (torch.narrow, (1, -3, 2)),
    "select": (torch.select, (1, -1)),
}


def taken(z: Tensor, chosen: list[Pick]) -> Tensor:
    """The rows of some picks, dimension by dimension from the last."""
    for pick in sorted(chosen, key=lambda pick: -pick.dim):
        z = z.index_select(pick.dim, torch.tensor(pick.rows, dtype=torch.int64))
        z = z.squeeze(pick.dim) if pick.drop else z
    return z


def entries(size: int) -> st.SearchStrategy[Any]:
    bound = st.none() | st.integers(-size - 1, size + 1)
    return st.integers(-size, size - 1) | st.builds(slice, bound, bound, st.none() | st.integers(1, 3))


@given(st.tuples(entries(4), entries(6)) | entries(4).map(lambda e: (e,)) | entries(3).map(lambda e: (Ellipsis, e)))
def test_an_index_picks_the_rows_that_torch_picks(index: tuple) -> None:
    result = picks("__getitem__", SHAPE, (index,), {})
    if result is not None:
        assert torch.equal(taken(Z, result[0]), Z[index])
    else:  # the same for every size, or the whole
        numbers = [b for e in index if isinstance(e, slice) for b in (e.start, e.stop, e.step) if b is not None]
        assert all(-1 <= n <= 1 for n in numbers) or torch.equal(Z[index], Z)


@pytest.mark.parametrize("name", CALLS)
def test_pieces_are_those_that_torch_makes(name: str) -> None:
    function, args = CALLS[name]
    expected = function(Z, *args)
    expected = [expected] if isinstance(expected, Tensor) else list(expected)
    actual = picks(name.split(" ")[0], SHAPE, args, {})
    assert actual is not None
    assert len(actual) == len(expected)
    assert all(torch.equal(taken(Z, chosen), piece) for chosen, piece in zip(actual, expected))


@pytest.mark.parametrize("index", [torch.tensor([1]), (None, 1), ([0, 2],), (True,), 4, -5, (slice(None), 6)], ids=str)
def test_what_is_no_constant_pick_is_read_as_it_stands(index: Any) -> None:
    assert picks("__getitem__", SHAPE, (index,), {}) is None


def test_a_call_with_wrong_arguments_is_left_to_complain_itself() -> None:
    assert picks("chunk", SHAPE, (0,), {}) is None
    assert picks("split", SHAPE, (), {}) is None
    assert picks("view", SHAPE, (-1,), {}) is None
