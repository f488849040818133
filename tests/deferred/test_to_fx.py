"""A program of recorded calls as an fx graph: spelled as Dynamo spells it, with symbols for numbers of tokens."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

from fusedhead.deferred.call_program import CallStep, Leaf, Made, Mode, encode
from fusedhead.deferred.to_fx import draft, dynamo_spelling
from fusedhead.graph.nodes import fake

MODE = Mode(True, None)
X, W = torch.randn(6, 4, requires_grad=True), torch.randn(9, 4)


def step(func: Any, subject: Leaf | Made, *args: Any, mode: Mode = MODE) -> CallStep:
    code = encode((torch.empty(0), *args), lambda _: subject)
    return CallStep(func, code, encode({}, lambda _: subject), mode)


def test_functions_are_spelled_as_dynamo_spells_them() -> None:
    assert dynamo_spelling(Tensor.view) == ("call_method", "view", ())
    assert dynamo_spelling(torch.exp) == ("call_function", torch.exp, ())
    assert dynamo_spelling(Tensor.__getitem__) == ("call_function", operator.getitem, ())
    assert dynamo_spelling(Tensor.mT.__get__) == ("call_function", getattr, ("mT",))  # type: ignore[attr-defined]


def test_tokens_are_symbols_and_exact_sizes_are_numbers() -> None:
    graph = draft([step(torch.exp, Leaf(0))], (X, W), frozenset({4, 9}), MODE)
    tokens, hidden = fake(graph.results[0]).shape
    assert isinstance(tokens, torch.SymInt)
    assert hidden == 4
    assert fake(graph.leaves[1]).shape == (9, 4)
    places, count = graph.function(f"8 * {tokens.node.expr}", [str(tokens.node.expr)])
    assert (places, count(6)) == (((0, 0),), 48)


def test_without_a_set_of_exact_sizes_all_are_numbers() -> None:
    graph = draft([step(torch.exp, Leaf(0))], (X, W), None, MODE)
    assert fake(graph.results[0]).shape == (6, 4)


def test_a_call_with_several_results_is_a_node_for_each() -> None:
    graph = draft([step(Tensor.split, Leaf(0), 2), step(torch.exp, Made(0, 1))], (X,), None, MODE)
    parts, result = graph.results
    assert [fake(part).shape for part in parts] == [(2, 4)] * 3
    assert result.args == (parts[1],)


def test_a_call_without_gradients_among_calls_with_them_is_detached() -> None:
    graph = draft([step(torch.exp, Leaf(0), mode=Mode(False, None)), step(torch.sin, Made(0))], (X,), None, MODE)
    assert [(node.op, node.target) for node in graph.graph.nodes][2:3] == [("call_method", "detach")]
    assert not fake(graph.results[1]).requires_grad
