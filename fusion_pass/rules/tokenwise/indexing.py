"""Picking tokens of what was made of logits token by token: it is made of the picked tokens instead.

A divergence that is computed for every token and then indexed by numbers costs its picked tokens only. The pick moves
to where the expression begins: to the heads, whose rows commute with the projection, and to the tensors from outside.
How many tokens a boolean mask picks is not known before it is run; of these the sum is read, Σ x[m] = Σ where(m, x, 0).
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import torch

from fusedhead.compat import maybe_get_fake_mode, tree_map
from fusedhead.ir.logits import Call, Escape, Logits, Plain
from fusedhead.ir.tokenwise import RowCall, RowLeaf, Rowwise, Seed
from fusedhead.rules.table import RULES, Context
from fusedhead.rules.tokenwise.operands import constants, same, size

aten = torch.ops.aten

# overload -> whether the dimension goes
PICKS = {aten.slice.Tensor: False, aten.select.int: True, aten.index_select.default: False}


def picked(target: Any, val: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """A pick along a dimension of tokens; NotImplemented along the tail."""
    x = args[0]
    if not isinstance(x, Rowwise) or kwargs:
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
        if not isinstance(e, (Seed, RowLeaf, RowCall)):
            return e
        if id(e) not in known:
            known[id(e)] = made_of_picked(e)
        return known[id(e)]

    def made_of_picked(e: Any) -> Any:
        if isinstance(e, Seed):
            if id(e.logits) not in known:
                known[id(e.logits)] = rows_of(e.logits, op, which)
            return Seed(known[id(e.logits)])
        if isinstance(e, RowLeaf):
            return RowLeaf(Plain(Call(op, (e.value, *which)), e.value.val), True) if e.by_rows else e
        return RowCall(e.op, *tree_map(of_picked, (e.args, e.kwargs)))

    return Rowwise(of_picked(x.expr), val, tail, x.heads)


def masked_rows(args: tuple, kwargs: dict[str, Any]) -> tuple[Rowwise, Plain] | None:
    """What ``x[mask]`` picks tokens of, and the mask as a tensor that broadcasts to x; None for another index."""
    x, indices = args if len(args) == 2 and not kwargs else (None, ())
    mask = indices[0] if indices else None
    if not isinstance(x, Rowwise) or not isinstance(mask, Plain) or any(i is not None for i in indices[1:]):
        return None
    dims = range(mask.val.ndim)
    if mask.val.dtype != torch.bool or not dims or any(x.tail[: len(dims)]) or x.small or not x.val.is_floating_point():
        return None
    if len(dims) > x.val.ndim or not all(same(mask.val.shape[d], x.val.shape[d]) for d in dims):
        return None
    shape = [*mask.val.shape, *(1 for _ in range(x.val.ndim - len(dims)))]
    column: Any = mask
    for _ in range(x.val.ndim - len(dims)):
        column = Call(aten.unsqueeze.default, (column, -1))
    return x, Plain(column if isinstance(column, Call) else mask.ref, mask.val.reshape(shape))


def by_number(target: Any, x: Rowwise, at: int, rest: tuple) -> tuple[Any, tuple]:
    """The pick as one along the flattened tokens, dimension 0: an op and its arguments after the tensor."""
    rows = [s for s, is_tail in zip(x.val.shape, x.tail) if not is_tail]
    which = tuple(a if isinstance(a, Plain) and isinstance(a.val, torch.Tensor) else constants(a) for a in rest)
    if len(rows) == 1:
        if PICKS[target]:
            raise Escape("one token is picked")
        return target, (0, *which)
    sizes = [size(s, "a choice of tokens") for s in rows]
    device, mode = x.val.device, maybe_get_fake_mode(x.val)
    numbers = Call(aten.arange.default, (math.prod(sizes),), {"device": device})
    call = Call(target, (Call(aten.reshape.default, (numbers, sizes)), at, *which))
    with mode or nullcontext():
        fakes = [a.val if isinstance(a, Plain) else a for a in which]
        chosen = target(torch.arange(math.prod(sizes), device=device).reshape(sizes), at, *fakes).reshape(-1)
    return aten.index_select.default, (0, Plain(Call(aten.reshape.default, (call, [-1])), chosen))


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
