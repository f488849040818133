"""Views share the memory of their tensor, copies have their own, an unknown value reaches that of its arguments."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fusedhead.graph.aliases import storage, storages
from tests.graph.dynamo import dynamo_graph, node_called

VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "view": lambda x: x.view(-1),
    "slice": lambda x: x[1:],
    "transpose": lambda x: x.t(),
    "detach": lambda x: x.detach(),
    "cast to the same dtype": lambda x: x.float(),
    "chunk": lambda x: x.chunk(2)[1],
}
COPIES: dict[str, Callable[[Tensor], Tensor]] = {
    "exp": lambda x: x.exp(),
    "clone": lambda x: x.clone(),
    "cast": lambda x: x.double(),
    "index": lambda x: x[[0, 1]],
}


def shares(result: Callable[[Tensor], Tensor]) -> bool:
    gm = dynamo_graph(lambda x: result(x).sin(), torch.ones(4, 4))
    (x,) = gm.graph.find_nodes(op="placeholder")
    (value,) = node_called(gm, "sin").all_input_nodes
    return bool(storages(x) & storages(value))


@pytest.mark.parametrize("made", VIEWS.values(), ids=VIEWS)
def test_a_view_has_the_memory_of_its_tensor(made: Callable[[Tensor], Tensor]) -> None:
    assert shares(made)


@pytest.mark.parametrize("made", COPIES.values(), ids=COPIES)
def test_a_copy_has_memory_of_its_own(made: Callable[[Tensor], Tensor]) -> None:
    assert not shares(made)


def test_overlapping_inputs_share_memory() -> None:
    base = torch.ones(6)
    gm = dynamo_graph(lambda a, b: a.sin() + b.cos(), base[:4], base[2:])
    first, second = gm.graph.find_nodes(op="placeholder")
    assert storages(first) == storages(second)


def test_a_number_has_no_memory() -> None:
    assert storage(3) is None
    assert storage(torch.float32) is None


def test_a_value_that_nobody_recorded_reaches_the_memory_of_its_arguments() -> None:
    gm = dynamo_graph(lambda x, y: x.sin() + y, torch.ones(3), torch.ones(3))
    x, y = gm.graph.find_nodes(op="placeholder")
    with gm.graph.inserting_after(y):
        handle = gm.graph.call_function(print, (x,))
    assert storages(handle) == storages(x)
    assert not storages(handle) & storages(y)
