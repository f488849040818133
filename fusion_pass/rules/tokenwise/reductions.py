"""Ops along the vocabulary, token by token: softmax, reductions, sorting.

A sum or mean over tokens as well is split: over the vocabulary in the token program, over tokens in the graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedhead.compat import tree_leaves
from fusedhead.graph.reasons import Escape
from fusedhead.ir.expr import Expr, Plain, map_each, map_nested
from fusedhead.ir.tokenwise import ProgramResult, TokenValue
from fusedhead.rules.table import Context, token_rule
from fusedhead.rules.tokenwise.operands import constants, from_logits, several, tail_dim
from fusedhead.rules.tokenwise.reasons import NotByTokens

aten = torch.ops.aten
SOFTMAXES = (aten.softmax.int, aten._softmax.default, aten.log_softmax.int, aten._log_softmax.default)
SPLIT_OVER_TOKENS = frozenset({aten.sum.dim_IntList, aten.mean.dim})
OVER_EVERYTHING = {
    aten.sum.default: aten.sum.dim_IntList,
    aten.mean.default: aten.mean.dim,
    aten.any.default: aten.any.dims,
    aten.all.default: aten.all.dims,
}


def plain_arguments(context: Context, args: tuple, kwargs: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """Arguments beside the first as constants. Raises Escape where one is a tensor."""
    if any(isinstance(x, Plain) and isinstance(x.val, Tensor) for x in tree_leaves((args, kwargs))):
        raise Escape(NotByTokens.OTHER_TENSOR, op=context.op)
    return map_each(args, constants), {name: map_nested(x, constants) for name, x in kwargs.items()}


@token_rule(*SOFTMAXES, aten.cumsum.default, aten.logcumsumexp.default, aten.argsort.default, dim=1)
def along_tail(context: Context, x: Any, *args: Any, **kwargs: Any) -> Any:
    """An op along one dimension that keeps their number; it may change its length."""
    x, at = from_logits(context, x), context.dim - 1  # type: ignore[operator]
    if context.op in SOFTMAXES and isinstance(context.val, Tensor) and not context.val.is_floating_point():
        raise Escape(NotByTokens.SOFTMAX_DTYPE, op=context.op, dtype=x.val.dtype)
    rest, named = plain_arguments(context, args, kwargs)
    rest[at] = tail_dim(context, x, rest[at])
    return several(Expr(context.op, (x.expr, *rest), named), context.val, x.tail, x.heads)


@token_rule(aten.linalg_vector_norm.default, dim=2)
@token_rule(
    aten.sum.dim_IntList, aten.mean.dim, aten.amax.default, aten.amin.default, aten.logsumexp.default,
    aten.argmax.default, aten.argmin.default, aten.max.dim, aten.min.dim, aten.prod.dim_int, aten.any.dim,
    aten.all.dim, aten.var.correction, aten.std.correction, dim=1,
)  # fmt: skip
def reduce_tail(context: Context, x: Any, *args: Any, **kwargs: Any) -> Any:
    """A reduction over some dimensions, which go or stay as 1."""
    x, at = from_logits(context, x), context.dim - 1  # type: ignore[operator]
    dim = map_nested(args[at], constants)
    dims = [d % x.val.ndim for d in ([dim] if isinstance(dim, int) else dim or ())] or list(range(x.val.ndim))
    if any(not x.tail[d] for d in dims):
        keepdim = (len(args) > 1 and bool(args[1])) or bool(kwargs.get("keepdim", False))
        return split_sum(context, context.op, x, dims, keepdim)
    rest, named = plain_arguments(context, args, kwargs)
    inner = [tail_dim(context, x, d) for d in dims]
    rest[at] = inner[0] if isinstance(dim, int) else tuple(inner)
    first = context.val if isinstance(context.val, Tensor) else context.val[0]
    kept = first.ndim == x.val.ndim
    tail = x.tail if kept else tuple(t for d, t in enumerate(x.tail) if d not in dims)
    return several(Expr(context.op, (x.expr, *rest), named), context.val, tail, x.heads)


@token_rule(aten.sort.default, dim=1)
@token_rule(aten.topk.default, dim=2)
def ranked(context: Context, x: Any, *args: Any, **kwargs: Any) -> Any:
    return along_tail(context, x, *args, **kwargs)


def split_sum(context: Context, op: Any, x: TokenValue, dims: list[int], keepdim: bool = False) -> Plain:
    """A sum or mean over tokens too: over the tail in the program's rows, over tokens in the graph."""
    if op not in SPLIT_OVER_TOKENS:
        raise Escape(NotByTokens.OVER_TOKENS, op=op)
    val = context.val
    wide = torch.float64 if x.val.dtype == torch.float64 else torch.float32 if val.is_floating_point() else val.dtype
    inner = tuple(d for d in dims if x.tail[d])
    rows = x
    if inner:
        over = tuple(tail_dim(context, x, d) for d in inner)
        rows = TokenValue(
            Expr(op, (x.expr, over, True), {"dtype": wide}), op(x.val, inner, True, dtype=wide), x.tail, x.heads
        )
    elif not x.small:
        raise Escape(NotByTokens.OVER_TOKENS_ALONE, op=op)
    out = Expr(op, (ProgramResult(rows), dims, keepdim))
    return Plain(Expr(aten.to.dtype, (out, val.dtype)), val)


@token_rule(aten.sum.default, aten.mean.default)
def total(context: Context, x: Any, **_: Any) -> Plain:
    x = from_logits(context, x)
    return split_sum(context, OVER_EVERYTHING[context.op], x, list(range(x.val.ndim)))


@token_rule(aten.any.default, aten.all.default)
def verdict(context: Context, x: Any) -> Plain:
    """any and all: over the tail in the program's rows, then over tokens in the graph."""
    x, op = from_logits(context, x), OVER_EVERYTHING[context.op]
    if x.small:
        raise Escape(NotByTokens.SMALL_ALREADY, op=context.op)
    tails = [d for d, is_tail in enumerate(x.tail) if is_tail]
    expr = Expr(op, (x.expr, tuple(tail_dim(context, x, d) for d in tails)))
    each_token = TokenValue(expr, op(x.val, tails), tuple(False for t in x.tail if not t), x.heads)
    return Plain(Expr(context.op, (ProgramResult(each_token),)), context.val)
