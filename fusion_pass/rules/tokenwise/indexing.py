"""Ops that pick tokens or classes of a token value, and those that read and write entries along the tail.

Picked tokens: only they are computed, so that a divergence of all tokens that is then indexed by numbers costs the
picked tokens alone. The pick moves to where the expression begins: to the heads, whose rows commute with the
projection, and to the tensors from outside. The number of tokens that a boolean mask picks is not known at compile
time, so that only their sum is read: Σ x[m] = Σ where(m, x, 0).

An op that may do either has two rules, of which the one for tokens is tried first.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fusedhead.compat import maybe_get_fake_mode
from fusedhead.graph.reasons import Escape
from fusedhead.graph.sizes import same_size
from fusedhead.ir.expr import Expr, Plain
from fusedhead.ir.logits import Logits, from_the_first
from fusedhead.ir.tokenwise import HeadInput, MaskedRows, TokenInput, TokenValue
from fusedhead.rules.table import RULES, Context, token_rule
from fusedhead.rules.tokenwise.elementwise import pointwise_tokens
from fusedhead.rules.tokenwise.operands import constants, from_logits, heads_among, known_size, lined_up, tail_dim
from fusedhead.rules.tokenwise.reasons import NotByTokens
from fusedhead.rules.tokenwise.reductions import along_tail

aten = torch.ops.aten

TOKEN_PICKS = (aten.slice.Tensor, aten.select.int, aten.index_select.default)


@token_rule(*TOKEN_PICKS)
def picked_tokens(context: Context, x: Any, dim: Any = 0, *rest: Any) -> TokenValue | None:
    """A pick along a dimension of tokens; None along the tail."""
    if not isinstance(x, TokenValue):
        return None
    dim = constants(dim) % x.val.ndim
    if x.tail[dim]:
        return None
    if x.small:
        raise Escape(NotByTokens.SMALL_ALREADY, op=context.op)
    op, which = by_number(context.op, x, dim - sum(x.tail[:dim]), rest)
    tail = tuple(t for d, t in enumerate(x.tail) if d != dim or context.op is not aten.select.int)
    memo: dict[int, Any] = {}

    def of_picked(e: Any) -> Any:
        if not isinstance(e, (HeadInput, TokenInput, Expr)):
            return e
        if id(e) not in memo:
            memo[id(e)] = made_of_picked(e)
        return memo[id(e)]

    def made_of_picked(e: Any) -> Any:
        if isinstance(e, HeadInput):
            if id(e.logits) not in memo:
                memo[id(e.logits)] = picked_rows(e.logits, op, which)
            return HeadInput(memo[id(e.logits)])
        if isinstance(e, TokenInput):
            return TokenInput(Plain(Expr(op, (e.value, *which)), e.value.val), True) if e.by_rows else e
        return Expr(e.op, *e.mapped(of_picked))

    return TokenValue(of_picked(x.expr), context.val, tail, x.heads)


def by_number(op: Any, x: TokenValue, at: int, rest: tuple) -> tuple[Any, tuple]:
    """The pick as one along the flattened tokens, dimension 0: an op and its arguments after the tensor."""
    rows = [s for s, is_tail in zip(x.val.shape, x.tail) if not is_tail]
    which = tuple(a if isinstance(a, Plain) and isinstance(a.val, torch.Tensor) else constants(a) for a in rest)
    if len(rows) == 1:
        if op is aten.select.int:
            raise Escape(NotByTokens.ONE_TOKEN)
        return op, (0, *which)
    sizes = [known_size(s, "a choice of tokens") for s in rows]
    device, mode = x.val.device, maybe_get_fake_mode(x.val)
    numbers = Expr(aten.arange.default, (math.prod(sizes),), {"device": device})
    call = Expr(op, (Expr(aten.reshape.default, (numbers, sizes)), at, *which))
    with mode or nullcontext():
        fakes = [a.val if isinstance(a, Plain) else a for a in which]
        chosen = op(torch.arange(math.prod(sizes), device=device).reshape(sizes), at, *fakes).reshape(-1)
    return aten.index_select.default, (0, Plain(Expr(aten.reshape.default, (call, [-1])), chosen))


def picked_rows(logits: Logits, op: Any, which: tuple) -> Logits:
    """The logits of the picked tokens, [n, V]."""

    def apply_rule(op: Any, *args: Any) -> None:
        nonlocal logits
        fakes = [a.val if isinstance(a, Plain) else a for a in args]
        logits = RULES[op](Context(None, op(logits.val, *fakes), op), logits, *args)  # type: ignore[arg-type]

    dims = range(logits.val.ndim)
    if logits.class_dim != len(dims) - 1:
        apply_rule(aten.permute.default, [d for d in dims if d != logits.class_dim] + [logits.class_dim])
    if len(dims) != 2:
        apply_rule(aten.reshape.default, [-1, logits.val.shape[-1]])
    apply_rule(op, *which)
    return logits


@token_rule(aten.slice.Tensor, dim=1)
def tail_slice(context: Context, x: Any, *args: Any, **kwargs: Any) -> Any:
    return along_tail(context, x, *args, **kwargs)


@token_rule(aten.select.int)
def tail_select(context: Context, x: Any, dim: int, index: Any) -> TokenValue:
    x = from_logits(context, x)
    d = dim % x.val.ndim
    expr = Expr(context.op, (x.expr, tail_dim(context, x, d), constants(index)))
    return TokenValue(expr, context.val, (*x.tail[:d], *x.tail[d + 1 :]), x.heads)


@token_rule(aten.index_select.default)
def tail_index_select(context: Context, x: Any, dim: int, which: Any) -> TokenValue:
    """Entries of the tail by a vector of numbers, ``z.index_select(-1, ids)``."""
    x = from_logits(context, x)
    if not isinstance(which, Plain) or which.val.dtype != torch.int64 or which.val.ndim != 1:
        raise Escape(NotByTokens.NO_VECTOR, op=context.op)
    expr = Expr(aten.index_select.default, (x.expr, tail_dim(context, x, dim), TokenInput(which, False)))
    return TokenValue(expr, context.val, x.tail, x.heads)


@token_rule(aten.index.Tensor)
def masked_tokens(context: Context, x: Any, indices: Any) -> MaskedRows | None:
    """``x[mask]``, of which the sum is read; None for another index."""
    mask = indices[0] if indices else None
    if not isinstance(x, TokenValue) or not isinstance(mask, Plain) or any(i is not None for i in indices[1:]):
        return None
    dims = range(mask.val.ndim)
    if mask.val.dtype != torch.bool or not dims or any(x.tail[: len(dims)]) or x.small or not x.val.is_floating_point():
        return None
    if len(dims) > x.val.ndim or not all(same_size(mask.val.shape[d], x.val.shape[d]) for d in dims):
        return None
    shape = [*mask.val.shape, *(1 for _ in range(x.val.ndim - len(dims)))]
    ref: Any = mask.ref
    for _ in range(x.val.ndim - len(dims)):
        ref = Expr(aten.unsqueeze.default, (ref, -1))
    column = Plain(ref, mask.val.reshape(shape))
    kept = pointwise_tokens(replace(context, val=x.val, op=aten.where.ScalarOther), column, x, 0.0)
    return MaskedRows(kept.expr, kept.val, kept.tail, kept.heads, mask)


@token_rule(aten.index.Tensor)
def tail_index(context: Context, x: Any, indices: Any) -> TokenValue:
    """The same as an index, ``z[:, [3, 7]]``: its numbers may count from the end, and lie on another device."""
    x, used = from_logits(context, x), [(d, i) for d, i in enumerate(indices) if i is not None]
    if len(used) != 1 or not isinstance(used[0][1], Plain):
        raise Escape(NotByTokens.SEVERAL_INDICES)
    (dim, which), device = used[0], x.val.device
    numbers = which if which.val.device == device else Expr(aten.to.device, (which, device, torch.int64))
    index = Plain(from_the_first(numbers, known_size(x.val.shape[dim], "an indexed dimension")), which.val)
    return tail_index_select(context, x, dim, index)


@token_rule(aten.gather.default, aten.scatter.value, aten.scatter.src, aten.scatter_add.default)
def tail_entries(context: Context, *args: Any, **kwargs: Any) -> TokenValue:
    """Entries along the tail, read or written: all tensors have the operand's dimensions, and its tokens."""
    like = next(a for a in args if isinstance(a, TokenValue))
    dim = tail_dim(context, like, constants(args[1]))
    operands: list[Any] = []
    for at, x in enumerate(args):
        if at == 1:
            operands.append(dim)
        elif isinstance(x, (TokenValue, Plain)) and isinstance(x.val, Tensor):
            if x.val.ndim != like.val.ndim or any(
                not t and not same_size(a, b) for t, a, b in zip(like.tail, x.val.shape, like.val.shape)
            ):
                raise Escape(NotByTokens.SOME_TOKENS, op=context.op)
            operands.append(lined_up(x, like.tail, x.val.shape, by_rows=True))
        else:
            operands.append(constants(x))
    named = {name: constants(x) for name, x in kwargs.items() if name != "sparse_grad"}
    return TokenValue(Expr(context.op, tuple(operands), named), context.val, like.tail, heads_among(args))
