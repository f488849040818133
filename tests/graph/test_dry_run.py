"""Dry runs: what a node writes, whether it draws numbers, and no answer where it cannot be run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, Node

from fusedhead.graph.dry_run import dry_run


def node_of(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
    """A call with its tensors as inputs, as Dynamo records it."""
    graph, mode = Graph(), FakeTensorMode()

    def given(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        node = graph.placeholder("x")
        node.meta["example_value"] = mode.from_tensor(x)
        return node

    return graph.call_function(function, tuple(map(given, args)), {k: given(v) for k, v in kwargs.items()})


X, Y, V = torch.randn(4, 3), torch.randn(4, 3), torch.rand(3)


@pytest.mark.parametrize(
    ("node", "written"),
    [
        (node_of(torch.add, X, Y), set()),
        (node_of(torch.Tensor.add_, X, Y), {0}),
        (node_of(torch.add, X, Y, out=X.clone()), {2}),
        (node_of(F.batch_norm, X, V, V.clone(), training=True), {1, 2}),
        (node_of(F.batch_norm, X, V, V.clone(), training=False), set()),
        (node_of(torch.ops.aten.copy_.default, X, Y), {0}),
        (node_of(torch.Tensor.__setitem__, X, 0, Y[0]), {0}),
    ],
    ids=str,
)
def test_the_arguments_that_a_call_writes_to(node: Node, written: set[int]) -> None:
    seen = dry_run(node)
    assert seen is not None
    assert seen.written == frozenset(written)


def test_a_write_to_a_view_is_a_write_to_its_argument() -> None:
    def writes(x: Tensor) -> Tensor:
        x[1:].t().zero_()
        return x

    seen = dry_run(node_of(writes, X))
    assert seen is not None
    assert seen.written == frozenset({0})


def test_no_value_changes_and_no_random_number_is_drawn() -> None:
    before, state = X.clone(), torch.get_rng_state()
    dry_run(node_of(torch.Tensor.mul_, X, Y))
    dry_run(node_of(F.dropout, X, 0.5))
    assert torch.equal(X, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_what_cannot_be_run_gives_no_answer() -> None:
    assert dry_run(node_of(torch.mm, X, X)) is None  # sizes that do not fit
    assert dry_run(node_of(lambda x: x.no_such_method(), X)) is None
