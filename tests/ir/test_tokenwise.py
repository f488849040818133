"""Token values: what they are computed from is met once and in order, and a row of few numbers may be returned."""

from __future__ import annotations

from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from fusedhead.ir.expr import Expr, Plain
from fusedhead.ir.tokenwise import HeadInput, ProgramResult, TokenInput, TokenValue, inputs_of, token_values_of

aten = torch.ops.aten
V = 64


def head() -> Any:
    return Mock(weight=Mock(val=torch.empty(V, 4)))


def token_value(expr: Any, val: Tensor, tail: tuple[bool, ...]) -> TokenValue:
    return TokenValue(expr, val, tail, frozenset({head()}))


@pytest.mark.parametrize(
    ("shape", "tail", "small"),
    [
        ((2, 5), (False, False), True),  # a number a token
        ((2, 5, 3), (False, False, True), True),  # top-3
        ((2, 5, V // 8), (False, False, True), True),
        ((2, 5, V // 8 + 1), (False, False, True), False),
        ((2, V, 5), (False, True, False), False),  # logits, the classes in the middle
    ],
)
def test_a_program_returns_rows_of_a_few_numbers(shape: tuple[int, ...], tail: tuple[bool, ...], small: bool) -> None:
    value = token_value(HeadInput(object()), torch.empty(shape), tail)  # type: ignore[arg-type]
    assert value.small == small
    assert value.tail_sizes == tuple(size for size, is_tail in zip(shape, tail) if is_tail)


def test_logits_and_tensors_are_met_once_and_in_order() -> None:
    first, second = (HeadInput(object()) for _ in range(2))  # type: ignore[arg-type]
    again = HeadInput(first.logits)  # the same logits, followed twice
    teacher = TokenInput(Plain(None, torch.empty(6, V)), by_rows=True)
    inner = Expr(aten.mul.Tensor, (first, teacher))
    whole = Expr(aten.add.Tensor, (inner, Expr(aten.sub.Tensor, (second, again))))
    heads, others = inputs_of([token_value(whole, torch.empty(6, V), (False, True))])
    assert heads == [first, second]
    assert others == [teacher]


def test_a_walk_may_stop_at_an_expression() -> None:
    first = HeadInput(object())  # type: ignore[arg-type]
    inner = Expr(aten.exp.default, (first,))
    value = token_value(Expr(aten.neg.default, (inner,)), torch.empty(6, V), (False, True))
    assert inputs_of([value], into=lambda expr: expr.op is not aten.exp.default)[0] == []


def test_results_of_a_program_inside_an_expression_of_the_graph_are_found() -> None:
    value = token_value(HeadInput(object()), torch.empty(6), (False,))  # type: ignore[arg-type]
    mean = Expr(aten.mean.default, (ProgramResult(value),))
    assert list(token_values_of(mean, value)) == [value, value]
