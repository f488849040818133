"""Ops that say how dimensions are laid out, or keep every number in its place: the same, on [N, ...].

Tokens may be regrouped among themselves and the rest among itself; what merges the two, or puts tokens into another
order, escapes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from fusedhead.ir.builder import static
from fusedhead.ir.expr import Expr, Plain
from fusedhead.ir.logits import Escape, from_the_first, rows_of_hidden
from fusedhead.ir.tokenwise import TokenInput, TokenValue, inputs_of
from fusedhead.rules.tokenwise.operands import constants, heads_of, lined_up, operand, same, size, tail_dim

aten = torch.ops.aten

CASTS = frozenset({aten.to.dtype, aten._to_copy.default, aten.type_as.default})
KEPT = frozenset({aten.clone.default, aten.contiguous.default, aten.alias.default})
FILLED = {
    aten.zeros_like.default: 0.0, aten.ones_like.default: 1.0, aten.full_like.default: None, aten.fill.Scalar: None,
}  # fmt: skip


def cast(target: Any, val: Any, args: tuple, kwargs: dict[str, Any]) -> TokenValue:
    x = operand(args[0], target)
    if val.device != x.val.device:
        raise Escape("what comes from the logits is moved to another device")
    expr = x.expr if val.dtype == x.val.dtype else Expr(aten.to.dtype, (x.expr, val.dtype))
    return TokenValue(expr, val, x.tail, x.heads)


def kept(target: Any, val: Any, args: tuple, kwargs: dict[str, Any]) -> TokenValue:
    x = operand(args[0], target)
    return TokenValue(x.expr, val, x.tail, x.heads)


def without_gradient(target: Any, val: Any, args: tuple, kwargs: dict[str, Any]) -> TokenValue:
    x = operand(args[0], target)
    return TokenValue(Expr(aten.detach.default, (x.expr,)), val, x.tail, x.heads)


def filled(target: Any, val: Any, args: tuple, kwargs: dict[str, Any]) -> TokenValue:
    x = operand(args[0], target)
    given = args[1] if len(args) > 1 else kwargs.get("fill_value")
    value = constants(given) if FILLED[target] is None else FILLED[target]
    return TokenValue(Expr(aten.full_like.default, (x.expr, value), {"dtype": val.dtype}), val, x.tail, x.heads)


def unsqueezed(target: Any, val: Any, args: tuple, kwargs: dict[str, Any]) -> TokenValue:
    x = operand(args[0], target)
    d = args[1] % val.ndim
    last_row = max((i for i, t in enumerate(x.tail) if not t), default=-1)
    among_rows = d <= last_row
    tail = (*x.tail[:d], not among_rows, *x.tail[d:])
    expr = x.expr if among_rows else Expr(aten.unsqueeze.default, (x.expr, 1 + sum(x.tail[:d])))
    return TokenValue(expr, val, tail, x.heads)


def squeezed(target: Any, val: Any, args: tuple, kwargs: dict[str, Any]) -> TokenValue:
    x = operand(args[0], target)
    listed = args[1] if len(args) > 1 else list(range(x.val.ndim))
    dims = {d % x.val.ndim for d in ([listed] if isinstance(listed, int) else listed)}
    gone = {d for d in dims if same(x.val.shape[d], 1)}
    if x.val.ndim - len(gone) != val.ndim:
        raise Escape("squeeze depends on a symbolic size")
    inner = tuple(1 + sum(x.tail[:d]) for d in sorted(gone) if x.tail[d])
    expr = Expr(aten.squeeze.dims, (x.expr, inner)) if inner else x.expr
    return TokenValue(expr, val, tuple(t for d, t in enumerate(x.tail) if d not in gone), x.heads)


def reshaped(target: Any, val: Any, args: tuple, kwargs: dict[str, Any]) -> TokenValue:
    """A view that regroups tokens among themselves and the tail among itself."""
    x = operand(args[0], target)
    tails = x.tail_sizes
    if x.tail != tuple(sorted(x.tail)):
        raise Escape("the dimensions of tokens and classes are merged by a view")
    entries = math.prod(size(t, "the tail") for t in tails)
    count, product = 0, 1
    while product != entries or (count < min(len(tails), val.ndim - 1) and same(val.shape[val.ndim - 1 - count], 1)):
        count += 1
        if count > val.ndim:
            raise Escape("the dimensions of tokens and classes are merged by a view")
        product *= size(val.shape[val.ndim - count], "the tail of a view")
        if product > entries:
            raise Escape("the dimensions of tokens and classes are merged by a view")
    shape = tuple(size(s, "the tail") for s in val.shape[val.ndim - count :])
    expr = x.expr if shape == tuple(tails) else Expr(aten.reshape.default, (x.expr, (-1, *shape)))
    return TokenValue(expr, val, tuple(d >= val.ndim - count for d in range(val.ndim)), x.heads)


def permuted(target: Any, val: Any, args: tuple, kwargs: dict[str, Any]) -> TokenValue:
    x = operand(args[0], target)
    n = x.val.ndim
    order = list(range(n))
    if target is aten.permute.default:
        order = [d % n for d in args[1]]
    elif target is aten.movedim.int:
        order.insert(args[2] % n, order.pop(args[1] % n))
    else:
        a, b = (0, 1) if target is aten.t.default else (args[1] % n, args[2] % n)
        if n > 1:
            order[a], order[b] = order[b], order[a]
    rows, tails = [d for d in order if not x.tail[d]], [d for d in order if x.tail[d]]
    if rows != sorted(rows):
        raise Escape("tokens are put into another order")
    expr = x.expr
    if tails != sorted(tails):
        expr = Expr(aten.permute.default, (expr, (0, *(1 + sum(x.tail[:d]) for d in tails))))
    return TokenValue(expr, val, tuple(x.tail[d] for d in order), x.heads)


def expanded(target: Any, val: Any, args: tuple, kwargs: dict[str, Any]) -> TokenValue:
    x = operand(args[0], target)
    if val.ndim != x.val.ndim or any(not t and not same(a, b) for t, a, b in zip(x.tail, x.val.shape, val.shape)):
        raise Escape("logits are repeated over tokens")
    tails = tuple(size(s, "the tail") for s, t in zip(val.shape, x.tail) if t)
    expr = x.expr if tails == x.tail_sizes else Expr(aten.expand.default, (x.expr, (-1, *tails)))
    return TokenValue(expr, val, x.tail, x.heads)


def joined(target: Any, val: Any, args: tuple, kwargs: dict[str, Any]) -> TokenValue:
    """cat along the tail, or stack into a new dimension of it."""
    listed, dim = args[0], constants(args[1] if len(args) > 1 else kwargs.get("dim", 0))
    like = next(x for x in listed if isinstance(x, TokenValue))
    stacked = target is aten.stack.default
    if like.val.ndim + stacked != val.ndim:
        raise Escape("a vector without entries is joined, which counts for nothing")
    d = dim % val.ndim
    tail = (*like.tail[:d], True, *like.tail[d:]) if stacked else like.tail
    if not tail[d]:
        raise Escape(f"{target} runs over tokens")
    if any(
        (isinstance(x, TokenValue) and x.tail != like.tail) or not isinstance(x, (TokenValue, Plain)) for x in listed
    ):
        raise Escape("tokens and classes are combined with each other")
    if any(not t and not same(a, b) for x in listed for t, a, b in zip(like.tail, x.val.shape, like.val.shape)):
        raise Escape("logits of different tokens are joined")
    exprs = [lined_up(x, like.tail, x.val.shape, by_rows=True) for x in listed]
    return TokenValue(Expr(target, (exprs, 1 + sum(tail[:d]))), val, tail, heads_of(listed))


def selected(target: Any, val: Any, args: tuple, kwargs: dict[str, Any]) -> TokenValue:
    x = operand(args[0], target)
    d = args[1] % x.val.ndim
    call = Expr(target, (x.expr, tail_dim(x, d, target), constants(args[2])))
    return TokenValue(call, val, (*x.tail[:d], *x.tail[d + 1 :]), x.heads)


def columns_chosen(target: Any, val: Any, args: tuple, kwargs: dict[str, Any]) -> TokenValue:
    """Entries of the tail by a vector of numbers, ``z.index_select(-1, ids)``."""
    x, dim, which = operand(args[0], target), *args[1:]
    if not isinstance(which, Plain) or which.val.dtype != torch.int64 or which.val.ndim != 1:
        raise Escape(f"{target} takes what is no vector of numbers")
    call = Expr(aten.index_select.default, (x.expr, tail_dim(x, dim, target), TokenInput(which, False)))
    return TokenValue(call, val, x.tail, x.heads)


def columns_indexed(target: Any, val: Any, args: tuple, kwargs: dict[str, Any]) -> TokenValue:
    """The same as an index, ``z[:, [3, 7]]``: its numbers may count from the end, and lie on another device."""
    x, used = operand(args[0], target), [(d, i) for d, i in enumerate(args[1]) if i is not None]
    if len(used) != 1 or not isinstance(used[0][1], Plain):
        raise Escape("what comes from the logits is indexed by several tensors, or by one that comes from them")
    (dim, which), here = used[0], x.val.device
    numbers = which if which.val.device == here else Expr(aten.to.device, (which, here, torch.int64))
    index = Plain(from_the_first(numbers, size(x.val.shape[dim], "an indexed dimension")), which.val)
    return columns_chosen(target, val, (x, dim, index), kwargs)


def length(target: Any, val: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """A size of a rowwise tensor, read off the hidden states where it is a symbol."""
    x = operand(args[0], target)
    known = static(x.val.shape[args[1]])
    if known is not None:
        return known
    for head in x.heads:
        hidden = head.hidden.val
        for d in range(hidden.ndim):
            if same(hidden.shape[d], x.val.shape[args[1]]):
                return Plain(Expr(target, (head.hidden, d)), val)
        if same(math.prod(hidden.shape[:-1]), x.val.shape[args[1]]):
            rows = Expr(aten.reshape.default, (head.hidden, [-1, size(hidden.shape[-1], "the hidden size")]))
            return Plain(Expr(target, (rows, 0)), val)
    for logits in (head.logits for head in inputs_of([x])[0]):
        for d in range(logits.val.ndim):
            if d != logits.class_dim and same(logits.val.shape[d], x.val.shape[args[1]]):
                return Plain(Expr(target, (rows_of_hidden(logits), d)), val)
    raise Escape("a symbolic number of tokens is computed with")


def lengths(target: Any, val: Any, args: tuple, kwargs: dict[str, Any]) -> list[Any]:
    """All sizes of a rowwise tensor."""
    shape = operand(args[0], target).val.shape
    return [length(aten.sym_size.int, n, (args[0], d), kwargs) for d, n in enumerate(shape)]


# overloads that only say how the dimensions are laid out, by the rule that reads them
LAYOUTS: dict[Any, Callable[..., Any]] = {
    aten.unsqueeze.default: unsqueezed,
    aten.squeeze.default: squeezed,
    aten.squeeze.dim: squeezed,
    aten.squeeze.dims: squeezed,
    aten.view.default: reshaped,
    aten.reshape.default: reshaped,
    aten._unsafe_view.default: reshaped,
    aten.flatten.using_ints: reshaped,
    aten.permute.default: permuted,
    aten.transpose.int: permuted,
    aten.t.default: permuted,
    aten.movedim.int: permuted,
    aten.expand.default: expanded,
    aten.detach.default: without_gradient,
    aten.cat.default: joined,
    aten.stack.default: joined,
    aten.select.int: selected,
    aten.index_select.default: columns_chosen,
    aten.index.Tensor: columns_indexed,
}
