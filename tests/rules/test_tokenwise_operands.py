"""Operands of an op on [N, ...]: which dimensions are tokens, and other tensors in their token by token form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fusedhead.graph.reasons import Escape
from fusedhead.ir.expr import Expr, Plain
from fusedhead.ir.tokenwise import TokenInput, TokenValue
from fusedhead.rules.table import Context
from fusedhead.rules.tokenwise.operands import (
    common_tail,
    constants,
    from_logits,
    heads_among,
    known_size,
    leaf,
    lined_up,
    several,
    tail_dim,
)
from fusedhead.rules.tokenwise.reasons import NotByTokens

B, T, V = 2, 3, 5
CONTEXT = Context(torch.fx.Graph().placeholder("x"), None, torch.ops.aten.sum.dim_IntList)
ROWS = (False, False, True)  # [B, T, V]


def value(shape: tuple[int, ...], tail: tuple[bool, ...], heads: str = "a") -> TokenValue:
    return TokenValue(Expr("logits", ()), torch.empty(shape), tail, frozenset(heads))  # type: ignore[arg-type]


def plain(*shape: int) -> Plain:
    x = torch.arange(float(torch.Size(shape).numel())).view(shape)
    return Plain(x, x)


def run(x: Any) -> Any:
    """The value of an expression over real tensors."""
    if isinstance(x, (Plain, TokenInput)):
        return run(x.ref if isinstance(x, Plain) else x.value)
    return x.op(*map(run, x.args)) if isinstance(x, Expr) else x


def refused(function: Any, *args: Any) -> NotByTokens:
    with pytest.raises(Escape) as escape:
        function(*args)
    reason = escape.value.refusal.reason
    assert isinstance(reason, NotByTokens)
    return reason


def test_a_pointwise_result_has_the_tail_of_its_operands() -> None:
    whole, totals = value((B, T, V), ROWS), value((B, T, 1), ROWS)
    result = torch.empty(B, T, V)
    assert common_tail(result, [whole, totals]) == ROWS
    assert common_tail(result, [totals, whole]) == ROWS
    assert common_tail(torch.empty(B, T), [value((B, T), (False, False))]) == (False, False)


@pytest.mark.parametrize(
    ("operands", "reason"),
    [
        ([value((B, V, V), ROWS), value((B, V, V), (False, True, False))], NotByTokens.TOKENS_WITH_CLASSES),
        ([value((V, V), (False, True))], NotByTokens.LOGITS_REPEATED),  # [V, V] over B
    ],
)  # fmt: skip
def test_operands_that_disagree_on_the_tokens_are_refused(operands: list[TokenValue], reason: NotByTokens) -> None:
    assert refused(common_tail, torch.empty(B, V, V), operands) is reason


def test_a_dimension_of_classes_is_counted_after_the_tokens() -> None:
    middle = value((B, V, T), (False, True, False))
    assert tail_dim(CONTEXT, middle, 1) == tail_dim(CONTEXT, middle, -2) == 1
    assert tail_dim(CONTEXT, value((V, T, 7), (True, False, True)), -1) == 2
    assert refused(tail_dim, CONTEXT, middle, 0) is NotByTokens.OVER_TOKENS


@pytest.mark.parametrize(
    ("shape", "by_rows", "expected"),
    [
        ((), False, ()),  # a number
        ((V,), False, (V,)),  # one a class
        ((1, 1, V), False, (V,)),
        ((B, T, V), False, (B * T, V)),  # one a token and class
        ((B, T, 1), False, (B * T, 1)),  # one a token
        ((T, 1), False, (B * T, 1)),  # one a token of a sequence, repeated
        ((V,), True, (1, V)),
    ],
)
def test_another_tensor_is_read_by_rows_or_broadcasts_to_the_tail(
    shape: tuple[int, ...], by_rows: bool, expected: tuple[int, ...]
) -> None:
    x = plain(*shape)
    rows_repeated = by_rows and len(shape) < len(ROWS)
    if rows_repeated:
        assert refused(leaf, x, ROWS, (B, T, V), by_rows) is NotByTokens.WIDE_OPERAND_REPEATED
        return
    read = leaf(x, ROWS, (B, T, V), by_rows)
    assert read.by_rows == (len(expected) > 1)
    result: Tensor = run(read)
    assert result.shape == expected
    assert torch.equal(result.expand(B * T, V), x.val.expand(B, T, V).reshape(-1, V))


def test_classes_before_tokens_are_moved_behind_them() -> None:
    x = plain(B, V, T)
    read = leaf(x, (False, True, False), (B, V, T), False)
    assert torch.equal(run(read), x.val.permute(0, 2, 1).reshape(-1, V))


def test_a_token_value_without_a_dimension_of_the_result_gets_one() -> None:
    whole, each = value((B, T, V), ROWS), value((B, T, V), ROWS)
    assert lined_up(whole, ROWS, (B, T, V)) is whole.expr
    moved = lined_up(value((T, V), (False, True)), (False, True, True), (T, 1, V))
    assert moved.args[1][0] == -1
    assert heads_among([whole, [each, value((1,), (False,), "b")]]) == {"a", "b"}


def test_numbers_are_constants_and_a_tensor_is_not_logits() -> None:
    assert constants(Plain(None, 3)) == 3
    assert constants("mean") == "mean"
    assert known_size(7, "a size") == 7
    assert refused(from_logits, CONTEXT, plain(3)) is NotByTokens.NOT_FIRST


def test_an_op_with_several_results_is_a_list_of_its_items() -> None:
    call = Expr("topk", ())
    values, indices = several(call, [torch.empty(B, 2), torch.empty(B, 2)], (False, True), frozenset("a"))
    assert [x.expr.args for x in (values, indices)] == [(call, 0), (call, 1)]
    assert several(call, torch.empty(B), (False,), frozenset("a")).expr is call
