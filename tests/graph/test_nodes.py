"""A node's op has one name in all spellings, its sizes are told without a guard, its line is the user's."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fusedhead.graph.nodes import BUILTIN_NAMES, every_dimension, fake, hint, most, name_of, where
from tests.graph.dynamo import dynamo_graph, node_called

SPELLINGS: dict[str, list[Callable[[Tensor], Tensor]]] = {
    "exp": [torch.exp, lambda x: x.exp(), torch.ops.aten.exp.default],
    "matmul": [lambda x: x @ x, lambda x: torch.matmul(x, x), lambda x: x.matmul(x)],
    "T": [lambda x: x.T],
    "mT": [lambda x: x.mT],
}


@pytest.mark.parametrize(("name", "spelling"), [(name, f) for name, several in SPELLINGS.items() for f in several])
def test_every_spelling_of_an_op_has_its_name(name: str, spelling: Callable[[Tensor], Tensor]) -> None:
    gm = dynamo_graph(lambda x: spelling(x) + 1, torch.ones(3, 3))
    assert name in {name_of(node) for node in gm.graph.nodes}


def test_the_name_of_a_function_that_is_bound_to_a_value_is_not_remembered() -> None:
    graph = torch.fx.Graph()
    assert name_of(graph.call_function([].append, (1,))) == "append"
    assert name_of(graph.call_function(operator.add, (1, 2))) == "add"
    assert operator.add in BUILTIN_NAMES
    assert not [known for known in BUILTIN_NAMES if isinstance(known.__self__, list)]


def test_an_input_has_no_name_although_it_may_be_called_like_an_op() -> None:
    gm = dynamo_graph(lambda exp: exp + 1, torch.ones(3))
    assert {name_of(node) for node in gm.graph.find_nodes(op="placeholder")} == {""}


FULL = slice(None)
INDICES = [
    (0, 3, [0, FULL, FULL]),
    ((..., 1), 3, [FULL, FULL, 1]),
    ((0, ..., 1), 4, [0, FULL, FULL, 1]),
    ((0, ...), 1, [0]),
    ((FULL, 2), 2, [FULL, 2]),
]


@pytest.mark.parametrize(("index", "ndim", "entries"), INDICES)
def test_an_index_has_an_entry_for_every_dimension(index: object, ndim: int, entries: list[object]) -> None:
    assert every_dimension(index, ndim) == entries


def test_a_symbol_has_the_size_of_this_call_and_the_end_of_its_range() -> None:
    def program(x: Tensor) -> Tensor:
        torch._check(x.shape[0] <= 100)
        return x.exp()

    size = fake(node_called(dynamo_graph(program, torch.ones(7), dynamic=True), "exp")).shape[0]
    assert isinstance(size, torch.SymInt)
    assert (hint(size), most(size)) == (7, 100)
    assert (hint(7), most(7)) == (7, 7)


def test_a_size_that_the_data_decide_has_no_hint_and_no_end() -> None:
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        gm = dynamo_graph(lambda x: x[x > 0].exp(), torch.ones(7))
    size = fake(node_called(gm, "exp")).shape[0]
    assert (hint(size), most(size)) in ((None, 7), (None, math.inf))


def test_a_node_is_found_where_the_user_wrote_it() -> None:
    def program(x: Tensor) -> Tensor:
        return x.exp()  # the line after the function's first

    node = node_called(dynamo_graph(program, torch.ones(3)), "exp")
    assert where(node) == f"test_nodes.py:{program.__code__.co_firstlineno + 1}"
    node.meta.clear()
    assert where(node) == node.name
