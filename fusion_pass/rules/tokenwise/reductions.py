"""Ops along the vocabulary, token by token: softmax, reductions, sorting, gather and scatter.

A sum or mean over tokens as well is split: over the vocabulary in the row program, over tokens in the graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedhead.compat import tree_leaves, tree_map
from fusedhead.ir.expr import Expr, Plain
from fusedhead.ir.logits import Escape
from fusedhead.ir.tokenwise import ProgramResult, TokenValue
from fusedhead.rules.tokenwise.operands import constants, heads_of, lined_up, operand, same, several, tail_dim

aten = torch.ops.aten

# overload -> position of its dimension argument; the result has the shape of the operand
ALONG: dict[Any, int] = {
    aten.softmax.int: 1, aten._softmax.default: 1, aten.log_softmax.int: 1, aten._log_softmax.default: 1,
    aten.cumsum.default: 1, aten.logcumsumexp.default: 1, aten.argsort.default: 1,
}  # fmt: skip
# overload -> position of its dimension argument; that dimension goes, or stays as 1
REDUCE: dict[Any, int] = {
    aten.sum.dim_IntList: 1, aten.mean.dim: 1, aten.amax.default: 1, aten.amin.default: 1,
    aten.logsumexp.default: 1, aten.argmax.default: 1, aten.argmin.default: 1, aten.max.dim: 1, aten.min.dim: 1,
    aten.prod.dim_int: 1, aten.any.dim: 1, aten.all.dim: 1, aten.var.correction: 1, aten.std.correction: 1,
    aten.linalg_vector_norm.default: 2,
}  # fmt: skip
# overload -> position of its dimension argument; that dimension changes its length
RESIZE: dict[Any, int] = {aten.topk.default: 2, aten.sort.default: 1, aten.slice.Tensor: 1}
DEFAULT_DIM = {aten.topk.default: -1, aten.sort.default: -1, aten.argsort.default: -1, aten.slice.Tensor: 0}
TOTALS = {aten.sum.default: aten.sum.dim_IntList, aten.mean.default: aten.mean.dim}
VERDICTS = {aten.any.default: aten.any.dims, aten.all.default: aten.all.dims}
SPLIT = frozenset({aten.sum.dim_IntList, aten.mean.dim})  # over tokens too: the rest is done on the row results
INDEXED = frozenset({aten.gather.default, aten.scatter.value, aten.scatter.src, aten.scatter_add.default})


def replaced(args: tuple, at: int, by: Any) -> tuple:
    return (*args[:at], by, *args[at + 1 :])


def dim_of(target: Any, args: tuple, kwargs: dict[str, Any], at: int) -> tuple[Any, tuple, dict[str, Any]]:
    """The dimension argument, and the arguments with its place filled, all positional up to it."""
    kwargs = dict(kwargs)
    names = [a.name for a in target._schema.arguments]
    filled = list(args)
    while len(filled) <= at:
        name = names[len(filled)]
        if name in kwargs:
            filled.append(kwargs.pop(name))
        elif len(filled) == at:
            filled.append(DEFAULT_DIM.get(target))
        else:
            filled.append(target._schema.arguments[len(filled)].default_value)
    return constants(filled[at]), tuple(filled), kwargs


def plain_arguments(args: tuple, kwargs: dict[str, Any], target: Any) -> tuple[tuple, dict[str, Any]]:
    if any(isinstance(x, Plain) and isinstance(x.val, Tensor) for x in tree_leaves((args, kwargs))):
        raise Escape(f"{target} takes another tensor")
    given, named = tree_map(constants, (args, kwargs))
    return given, named


SOFT = frozenset({aten.softmax.int, aten._softmax.default, aten.log_softmax.int, aten._log_softmax.default})


def along(target: Any, val: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    x = operand(args[0], target)
    if target in SOFT and isinstance(val, Tensor) and not val.is_floating_point():
        raise Escape(f"{target} of {x.val.dtype} is an error, which fake values do not see")
    dim, args, kwargs = dim_of(target, args, kwargs, (ALONG | RESIZE)[target])
    rest, named = plain_arguments(args[1:], kwargs, target)
    given = replaced((x.expr, *rest), (ALONG | RESIZE)[target], tail_dim(x, dim, target))
    return several(Expr(target, given, named), val, x.tail, x.heads)


def reduced(target: Any, val: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    at = REDUCE[target]
    x = operand(args[0], target)
    dim, args, kwargs = dim_of(target, args, kwargs, at)
    listed = [dim] if isinstance(dim, int) else [*map(constants, dim or ())]
    dims = [d % x.val.ndim for d in listed] or list(range(x.val.ndim))
    if any(not x.tail[d] for d in dims):
        return split(target, val, x, dims, args, kwargs)
    rest, named = plain_arguments(args[1:], kwargs, target)
    inner = [tail_dim(x, d, target) for d in dims]
    given = replaced((x.expr, *rest), at, inner[0] if isinstance(dim, int) else tuple(inner))
    first = val if isinstance(val, Tensor) else val[0]
    kept = first.ndim == x.val.ndim
    tail = x.tail if kept else tuple(t for d, t in enumerate(x.tail) if d not in dims)
    return several(Expr(target, given, named), val, tail, x.heads)


def split(target: Any, val: Any, x: TokenValue, dims: list[int], args: tuple, kwargs: dict[str, Any]) -> Plain:
    """A sum or mean over tokens too: over the tail in the program's rows, over tokens in the graph."""
    if target not in SPLIT:
        raise Escape(f"{target} runs over tokens")
    keepdim = (len(args) > 2 and bool(args[2])) or bool(kwargs.get("keepdim", False))
    wide = torch.float64 if x.val.dtype == torch.float64 else torch.float32 if val.is_floating_point() else val.dtype
    inner = tuple(d for d in dims if x.tail[d])
    rows = x
    if inner:
        call = Expr(target, (x.expr, tuple(tail_dim(x, d, target) for d in inner), True), {"dtype": wide})
        rows = TokenValue(call, target(x.val, inner, True, dtype=wide), x.tail, x.heads)
    elif not x.small:
        raise Escape(f"{target} of the logits over tokens alone")
    out = Expr(target, (ProgramResult(rows), dims, keepdim))
    return Plain(Expr(aten.to.dtype, (out, val.dtype)), val)


def total(target: Any, val: Any, args: tuple, kwargs: dict[str, Any]) -> Plain:
    x = operand(args[0], target)
    return split(TOTALS[target], val, x, list(range(x.val.ndim)), (), {})


def verdict(target: Any, val: Any, args: tuple, kwargs: dict[str, Any]) -> Plain:
    """any and all: over the tail in the program's rows, then over tokens in the graph."""
    x = operand(args[0], target)
    if x.small:
        raise Escape(f"{target} of a few numbers a token is left to the graph")
    tails = [d for d, is_tail in enumerate(x.tail) if is_tail]
    call = Expr(VERDICTS[target], (x.expr, tuple(tail_dim(x, d, target) for d in tails)))
    each = TokenValue(call, VERDICTS[target](x.val, tails), tuple(False for t in x.tail if not t), x.heads)
    return Plain(Expr(target, (ProgramResult(each),)), val)


def indexed(target: Any, val: Any, args: tuple, kwargs: dict[str, Any]) -> TokenValue:
    """gather and scatter along the tail: all tensors have the operand's dimensions, and its tokens."""
    like = next(a for a in args if isinstance(a, TokenValue))
    tail_dim_at = tail_dim(like, constants(args[1]), target)
    given: list[Any] = []
    for at, x in enumerate(args):
        if at == 1:
            given.append(tail_dim_at)
        elif isinstance(x, (TokenValue, Plain)) and isinstance(x.val, Tensor):
            if x.val.ndim != like.val.ndim or any(
                not t and not same(a, b) for t, a, b in zip(like.tail, x.val.shape, like.val.shape)
            ):
                raise Escape(f"{target} reads only some of the tokens")
            given.append(lined_up(x, like.tail, x.val.shape, by_rows=True))
        else:
            given.append(constants(x))
    named = {k: constants(v) for k, v in kwargs.items() if k not in ("sparse_grad",)}
    return TokenValue(Expr(target, tuple(given), named), val, like.tail, heads_of(args))
