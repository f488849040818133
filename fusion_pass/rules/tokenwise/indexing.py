"""Picking tokens of what was made of logits token by token: it is made of the picked tokens instead.

A divergence that is computed for every token and then indexed by a mask costs its picked tokens only. The pick moves
to where the expression begins: to the heads, whose rows commute with the projection, and to the tensors from outside.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import torch

from fusedhead.compat import maybe_get_fake_mode
from fusedhead.ir.expr import Expr, Plain
from fusedhead.ir.logits import Escape, Logits
from fusedhead.ir.tokenwise import HeadInput, TokenInput, TokenValue
from fusedhead.rules.table import RULES, Context
from fusedhead.rules.tokenwise.operands import constants, size

aten = torch.ops.aten

# overload -> whether the dimension goes
PICKS = {aten.slice.Tensor: False, aten.select.int: True, aten.index_select.default: False}


def picked(target: Any, val: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """A pick along a dimension of tokens; NotImplemented along the tail."""
    x = args[0]
    if not isinstance(x, TokenValue) or kwargs:
        return NotImplemented
    dim = (constants(args[1]) if len(args) > 1 else 0) % x.val.ndim
    if x.tail[dim]:
        return NotImplemented
    if x.small:
        raise Escape(f"{target} of a few numbers a token is left to the graph")
    op, which = by_number(target, x, dim - sum(x.tail[:dim]), args[2:])
    tail = tuple(t for d, t in enumerate(x.tail) if d != dim or not PICKS[target])
    known: dict[int, Any] = {}

    def of_picked(e: Any) -> Any:
        if not isinstance(e, (HeadInput, TokenInput, Expr)):
            return e
        if id(e) not in known:
            known[id(e)] = made_of_picked(e)
        return known[id(e)]

    def made_of_picked(e: Any) -> Any:
        if isinstance(e, HeadInput):
            if id(e.logits) not in known:
                known[id(e.logits)] = rows_of(e.logits, op, which)
            return HeadInput(known[id(e.logits)])
        if isinstance(e, TokenInput):
            return TokenInput(Plain(Expr(op, (e.value, *which)), e.value.val), True) if e.by_rows else e
        return Expr(e.op, *e.mapped(of_picked))

    return TokenValue(of_picked(x.expr), val, tail, x.heads)


def by_number(target: Any, x: TokenValue, at: int, rest: tuple) -> tuple[Any, tuple]:
    """The pick as one along the flattened tokens, dimension 0: an op and its arguments after the tensor."""
    rows = [s for s, is_tail in zip(x.val.shape, x.tail) if not is_tail]
    which = tuple(a if isinstance(a, Plain) and isinstance(a.val, torch.Tensor) else constants(a) for a in rest)
    if len(rows) == 1:
        if PICKS[target]:
            raise Escape("one token is picked")
        return target, (0, *which)
    sizes = [size(s, "a choice of tokens") for s in rows]
    device, mode = x.val.device, maybe_get_fake_mode(x.val)
    numbers = Expr(aten.arange.default, (math.prod(sizes),), {"device": device})
    call = Expr(target, (Expr(aten.reshape.default, (numbers, sizes)), at, *which))
    with mode or nullcontext():
        fakes = [a.val if isinstance(a, Plain) else a for a in which]
        chosen = target(torch.arange(math.prod(sizes), device=device).reshape(sizes), at, *fakes).reshape(-1)
    return aten.index_select.default, (0, Plain(Expr(aten.reshape.default, (call, [-1])), chosen))


def rows_of(logits: Logits, op: Any, which: tuple) -> Logits:
    """The logits of the picked tokens, [n, V]."""

    def then(op: Any, *args: Any) -> None:
        nonlocal logits
        fakes = [a.val if isinstance(a, Plain) else a for a in args]
        logits = RULES[op](Context(None, op(logits.val, *fakes)), logits, *args)  # type: ignore[arg-type]

    dims = range(logits.val.ndim)
    if logits.class_dim != len(dims) - 1:
        then(aten.permute.default, [d for d in dims if d != logits.class_dim] + [logits.class_dim])
    if len(dims) != 2:
        then(aten.reshape.default, [-1, logits.val.shape[-1]])
    then(op, *which)
    return logits
