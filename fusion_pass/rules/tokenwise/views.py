"""Views and other ops on the layout of dimensions, on [N, ...].

Tokens may be regrouped among themselves, and so may the other dimensions. An op that merges the two or reorders tokens
escapes.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from fusedhead.graph.reasons import Escape
from fusedhead.graph.sizes import same_size, static
from fusedhead.ir.expr import Expr, Plain
from fusedhead.ir.logits import rows_of_hidden
from fusedhead.ir.tokenwise import TokenValue, inputs_of
from fusedhead.rules.table import Context, token_rule
from fusedhead.rules.tokenwise.operands import constants, from_logits, heads_among, known_size, lined_up
from fusedhead.rules.tokenwise.reasons import NotByTokens

aten = torch.ops.aten


@token_rule(aten.unsqueeze.default)
def unsqueezed(context: Context, x: Any, dim: int) -> TokenValue:
    x = from_logits(context, x)
    d = dim % context.val.ndim
    last_row = max((i for i, t in enumerate(x.tail) if not t), default=-1)
    among_rows = d <= last_row
    tail = (*x.tail[:d], not among_rows, *x.tail[d:])
    expr = x.expr if among_rows else Expr(aten.unsqueeze.default, (x.expr, 1 + sum(x.tail[:d])))
    return TokenValue(expr, context.val, tail, x.heads)


@token_rule(aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims)
def squeezed(context: Context, x: Any, dims: Any = None) -> TokenValue:
    x = from_logits(context, x)
    listed = range(x.val.ndim) if dims is None else [dims] if isinstance(dims, int) else dims
    gone = {d for d in (d % x.val.ndim for d in listed) if same_size(x.val.shape[d], 1)}
    if x.val.ndim - len(gone) != context.val.ndim:
        raise Escape(NotByTokens.SQUEEZE_SYMBOLIC)
    inner = tuple(1 + sum(x.tail[:d]) for d in sorted(gone) if x.tail[d])
    expr = Expr(aten.squeeze.dims, (x.expr, inner)) if inner else x.expr
    return TokenValue(expr, context.val, tuple(t for d, t in enumerate(x.tail) if d not in gone), x.heads)


@token_rule(aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints)
def regrouped(context: Context, x: Any, *_: Any) -> TokenValue:
    """A view that regroups tokens among themselves and the tail among itself."""
    x, val = from_logits(context, x), context.val
    tails = x.tail_sizes
    if x.tail != tuple(sorted(x.tail)):
        raise Escape(NotByTokens.MERGES_TOKENS_AND_CLASSES)
    entries = math.prod(known_size(t, "the tail") for t in tails)
    count, product = 0, 1
    while product != entries or (
        count < min(len(tails), val.ndim - 1) and same_size(val.shape[val.ndim - 1 - count], 1)
    ):
        count += 1
        if count > val.ndim:
            raise Escape(NotByTokens.MERGES_TOKENS_AND_CLASSES)
        product *= known_size(val.shape[val.ndim - count], "the tail of a view")
        if product > entries:
            raise Escape(NotByTokens.MERGES_TOKENS_AND_CLASSES)
    shape = tuple(known_size(s, "the tail") for s in val.shape[val.ndim - count :])
    expr = x.expr if shape == tuple(tails) else Expr(aten.reshape.default, (x.expr, (-1, *shape)))
    return TokenValue(expr, val, tuple(d >= val.ndim - count for d in range(val.ndim)), x.heads)


@token_rule(aten.permute.default, aten.transpose.int, aten.t.default, aten.movedim.int)
def permuted(context: Context, x: Any, *dims: Any) -> TokenValue:
    x = from_logits(context, x)
    n = x.val.ndim
    order = list(range(n))
    if context.op is aten.permute.default:
        order = [d % n for d in dims[0]]
    elif context.op is aten.movedim.int:
        order.insert(dims[1] % n, order.pop(dims[0] % n))
    else:
        a, b = (0, 1) if context.op is aten.t.default else (dims[0] % n, dims[1] % n)
        if n > 1:
            order[a], order[b] = order[b], order[a]
    rows, tails = [d for d in order if not x.tail[d]], [d for d in order if x.tail[d]]
    if rows != sorted(rows):
        raise Escape(NotByTokens.REORDERS_TOKENS)
    expr = x.expr
    if tails != sorted(tails):
        expr = Expr(aten.permute.default, (expr, (0, *(1 + sum(x.tail[:d]) for d in tails))))
    return TokenValue(expr, context.val, tuple(x.tail[d] for d in order), x.heads)


@token_rule(aten.expand.default)
def expanded(context: Context, x: Any, *_: Any, **__: Any) -> TokenValue:
    x, val = from_logits(context, x), context.val
    if val.ndim != x.val.ndim or any(not t and not same_size(a, b) for t, a, b in zip(x.tail, x.val.shape, val.shape)):
        raise Escape(NotByTokens.LOGITS_REPEATED)
    tails = tuple(known_size(s, "the tail") for s, t in zip(val.shape, x.tail) if t)
    expr = x.expr if tails == x.tail_sizes else Expr(aten.expand.default, (x.expr, (-1, *tails)))
    return TokenValue(expr, val, x.tail, x.heads)


@token_rule(aten.cat.default, aten.stack.default)
def join_tails(context: Context, tensors: Any, dim: Any = 0) -> TokenValue:
    """cat along the tail, or stack into a new dimension of it."""
    dim, val = constants(dim), context.val
    like = next(x for x in tensors if isinstance(x, TokenValue))
    stacked = context.op is aten.stack.default
    if like.val.ndim + stacked != val.ndim:
        raise Escape(NotByTokens.EMPTY_OPERAND)
    d = dim % val.ndim
    tail = (*like.tail[:d], True, *like.tail[d:]) if stacked else like.tail
    if not tail[d]:
        raise Escape(NotByTokens.OVER_TOKENS, op=context.op)
    if any(
        (isinstance(x, TokenValue) and x.tail != like.tail) or not isinstance(x, (TokenValue, Plain)) for x in tensors
    ):
        raise Escape(NotByTokens.TOKENS_WITH_CLASSES)
    if any(not t and not same_size(a, b) for x in tensors for t, a, b in zip(like.tail, x.val.shape, like.val.shape)):
        raise Escape(NotByTokens.OTHER_TOKENS)
    exprs = [lined_up(x, like.tail, x.val.shape, by_rows=True) for x in tensors]
    return TokenValue(Expr(context.op, (exprs, 1 + sum(tail[:d]))), val, tail, heads_among(tensors))


@token_rule(aten.sym_size.int)
def length(context: Context, x: Any, dim: int) -> Any:
    """A size of a token value, read off the hidden states where it is a symbol."""
    x = from_logits(context, x)
    size = static(x.val.shape[dim])
    if size is not None:
        return size
    for head in x.heads:
        hidden = head.hidden.val
        for d in range(hidden.ndim):
            if same_size(hidden.shape[d], x.val.shape[dim]):
                return Plain(Expr(context.op, (head.hidden, d)), context.val)
        if same_size(math.prod(hidden.shape[:-1]), x.val.shape[dim]):
            rows = Expr(aten.reshape.default, (head.hidden, [-1, known_size(hidden.shape[-1], "the hidden size")]))
            return Plain(Expr(context.op, (rows, 0)), context.val)
    for logits in (head.logits for head in inputs_of([x])[0]):
        for d in range(logits.val.ndim):
            if d != logits.class_dim and same_size(logits.val.shape[d], x.val.shape[dim]):
                return Plain(Expr(context.op, (rows_of_hidden(logits), d)), context.val)
    raise Escape(NotByTokens.SYMBOLIC_TOKENS)


@token_rule(aten.size.default, aten.sym_size.default)
def lengths(context: Context, x: Any) -> list[Any]:
    """All sizes of a token value."""
    of_one = replace(context, op=aten.sym_size.int)
    return [length(replace(of_one, val=n), x, d) for d, n in enumerate(from_logits(context, x).val.shape)]
