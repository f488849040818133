"""Dispatch token by token: arguments in their places, autocast's casts, decompositions, and reasons to refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from fusedhead.compat import FakeTensorMode
from fusedhead.graph.reasons import Escape
from fusedhead.ir.expr import Expr, Plain
from fusedhead.ir.logits import Logits, LogProbs, Probs, ProbTimes, StackedProjection
from fusedhead.ir.tokenwise import HeadInput, MaskedRows, TokenValue
from fusedhead.rules.table import Context
from fusedhead.rules.tokenwise.dispatch import (
    first_dtype,
    is_composite,
    positional,
    read_by_tokens,
    token_value,
    widened,
)
from fusedhead.rules.tokenwise.reasons import NotByTokens

aten = torch.ops.aten
N, V = 4, 7
NODE = torch.fx.Graph().placeholder("z")
REAL = torch.randn(N, V)


def logits(dtype: torch.dtype = torch.float32) -> Logits:
    with FakeTensorMode():
        return Logits(Mock(), torch.empty(N, V, dtype=dtype), 1)


def read(op: Any, *args: Any, val: Tensor | None = None, alone: Tensor | None = None) -> TokenValue:
    val = REAL if val is None else val
    return read_by_tokens(Context(NODE, val, op, alone=val if alone is None else alone), *args)


def run(x: Any) -> Any:
    """The value of a token program's expression with real logits."""
    if isinstance(x, HeadInput):
        return REAL
    if isinstance(x, Expr):
        return x.op(*map(run, x.args), **{name: run(value) for name, value in x.kwargs.items()})
    return x


def test_arguments_by_name_and_defaults_take_their_places() -> None:
    args, kwargs = positional(aten.sum.dim_IntList, (1,), {"keepdim": True, "dtype": None}, 2)
    assert (args, kwargs) == ((1, None, True), {"dtype": None})
    assert positional(aten.softmax.int, (1,), {"dim": -1}, 1) == ((1, -1), {})


def test_only_ops_that_are_made_of_others_are_composite() -> None:
    assert is_composite(aten.softmax.int)
    assert not is_composite(aten.exp.default)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (lambda z: z, REAL),
        (lambda z: LogProbs(z, z.val, 2.0), 2 * REAL.log_softmax(1)),
        (lambda z: Probs(z, z.val), REAL.softmax(1)),
        (lambda z: ProbTimes(z, z.val, log=True, factor=-1.0), -REAL.softmax(1) * REAL.log_softmax(1)),
        (lambda z: ProbTimes(z, z.val, log=False), REAL.softmax(1) * REAL),
        (lambda z: ProbTimes(z, z.val, log=True, power=2, weighted=False), REAL.log_softmax(1) ** 2),
    ],
)
def test_what_is_known_of_logits_is_computed_by_its_definition(
    value: Callable[[Logits], Any], expected: Tensor
) -> None:
    z = logits()
    result = token_value(value(z))
    torch.testing.assert_close(run(result.expr), expected)
    assert (result.tail, result.heads) == ((False, True), {z.head})


def test_a_pointwise_op_needs_no_rule_and_a_composite_one_is_taken_apart() -> None:
    torch.testing.assert_close(run(read(aten.erf.default, logits()).expr), REAL.erf())
    torch.testing.assert_close(run(read(aten.softmax.int, logits(), 1).expr), REAL.softmax(1))


def test_an_operand_is_widened_as_autocast_does() -> None:
    z = logits(torch.bfloat16)
    wide = widened(token_value(z), torch.float32)
    assert wide.expr.args[1] == wide.val.dtype == torch.float32
    assert widened(wide, torch.float32) is wide
    assert widened(3.0, torch.float32) == 3.0
    assert widened(Plain(None, torch.empty(2, dtype=torch.int64)), torch.float32).val.dtype == torch.int64
    result = read(aten.exp.default, z, alone=REAL.bfloat16())  # float32 in the program, bfloat16 alone
    assert result.expr.args[0].op is aten.to.dtype
    assert first_dtype([torch.empty(2, dtype=torch.int64), REAL.double()]) == torch.float64


def masked(z: Logits) -> MaskedRows:
    value = token_value(z)
    return MaskedRows(value.expr, value.val, value.tail, value.heads, mask=Plain(None, torch.ones(N, dtype=torch.bool)))


@pytest.mark.parametrize(
    ("reason", "call"),
    [
        (NotByTokens.NO_NEW_TENSOR, lambda z: read(aten.exp_.default, z)),
        (NotByTokens.AUTOCAST, lambda z: read(aten.exp.default, z, val=REAL.bfloat16(), alone=REAL)),
        (NotByTokens.MASKED, lambda z: read(aten.exp.default, masked(z))),
        (NotByTokens.OVER_TOKENS, lambda z: read(aten.cumsum.default, z, 0)),
        (NotByTokens.UNKNOWN_OP, lambda z: read(aten.svd.default, z)),
        (NotByTokens.STACKED, lambda z: token_value(Logits(Mock(spec=StackedProjection), z.val, 1))),
    ],
)
def test_an_op_that_mixes_tokens_or_is_not_known_is_refused(reason: NotByTokens, call: Callable[[Logits], Any]) -> None:
    with pytest.raises(Escape) as escape:
        call(logits())
    assert escape.value.refusal.reason is reason
