"""Elementwise ops, casts, and ops that fill a tensor of the same shape."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedhead.compat import OpOverload, tree_leaves
from fusedhead.graph.reasons import Escape
from fusedhead.graph.sizes import same_size
from fusedhead.ir.expr import Expr, map_each, map_nested
from fusedhead.ir.tokenwise import TokenValue
from fusedhead.rules.table import Context, token_rule
from fusedhead.rules.tokenwise.operands import common_tail, constants, from_logits, heads_among, lined_up
from fusedhead.rules.tokenwise.reasons import NotByTokens

aten = torch.ops.aten
DTYPE_OPS = (aten.to.dtype, aten._to_copy.default, aten.type_as.default)  # their result has the dtype that they name
FILLED_WITH = {aten.zeros_like.default: 0.0, aten.ones_like.default: 1.0}
PLACEMENT = ("memory_format", "device", "layout", "pin_memory")  # arguments that say where a result lies


@token_rule(*DTYPE_OPS)
def cast_tokens(context: Context, x: Any, *_: Any, **__: Any) -> TokenValue:
    x = from_logits(context, x)
    if context.val.device != x.val.device:
        raise Escape(NotByTokens.OTHER_DEVICE)
    same_dtype = context.val.dtype == x.val.dtype
    expr = x.expr if same_dtype else Expr(aten.to.dtype, (x.expr, context.val.dtype))
    return TokenValue(expr, context.val, x.tail, x.heads)


@token_rule(aten.clone.default, aten.contiguous.default, aten.alias.default)
def same_numbers(context: Context, x: Any, **_: Any) -> TokenValue:
    x = from_logits(context, x)
    return TokenValue(x.expr, context.val, x.tail, x.heads)


@token_rule(*FILLED_WITH, aten.full_like.default, aten.fill.Scalar)
def fill_tokens(context: Context, x: Any, fill_value: Any = None, **_: Any) -> TokenValue:
    x = from_logits(context, x)
    value = FILLED_WITH[context.op] if context.op in FILLED_WITH else constants(fill_value)
    expr = Expr(aten.full_like.default, (x.expr, value), {"dtype": context.val.dtype})
    return TokenValue(expr, context.val, x.tail, x.heads)


@token_rule(aten.detach.default)
def detach_tokens(context: Context, x: Any) -> TokenValue:
    x = from_logits(context, x)
    return TokenValue(Expr(aten.detach.default, (x.expr,)), context.val, x.tail, x.heads)


def pointwise_tokens(context: Context, *args: Any, **kwargs: Any) -> TokenValue:
    """Any op that torch tags as pointwise: the default of `TOKEN_RULES`."""
    if not isinstance(context.val, Tensor):
        raise Escape(NotByTokens.SEVERAL_RESULTS, op=context.op)
    operands = [x for x in tree_leaves((args, kwargs)) if isinstance(x, TokenValue)]
    return entrywise(context, args, kwargs, common_tail(context.val, operands), heads_among(operands))


def is_pointwise(op: Any) -> bool:
    if not isinstance(op, OpOverload):
        return False  # Python arithmetic on sizes
    return torch.Tag.pointwise in op.tags and torch.Tag.nondeterministic_seeded not in op.tags


def entrywise(
    context: Context, args: tuple, kwargs: dict[str, Any], tail: tuple[bool, ...], heads: frozenset[Any]
) -> TokenValue:
    """A pointwise op with its operands lined up; none of them need come from the logits."""

    def line_up(x: Any) -> Any:
        return lined_up(x, tail, context.val.shape)

    named = {name: map_nested(x, line_up) for name, x in kwargs.items() if name not in PLACEMENT}
    return TokenValue(Expr(context.op, tuple(map_each(args, line_up)), named), context.val, tail, heads)


def as_wide(val: Any, operands: list[Any]) -> TokenValue | None:
    """The operand that comes from the logits and has the shape of ``val``; None if there is none."""
    wide = (x for x in operands if isinstance(x, TokenValue) and not x.small)
    if not isinstance(val, Tensor):
        return None
    return next((x for x in wide if x.val.ndim == val.ndim and all(map(same_size, x.val.shape, val.shape))), None)
