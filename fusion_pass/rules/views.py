"""Ops that move or reshape rows of the logits and keep every row's vocabulary whole.

They commute with the projection, so each becomes a `RowStep` to be replayed on the hidden states with D in
place of V. A rule says where the vocabulary's dimension went and what the op's arguments are when replayed; it
must refuse whenever it cannot prove that the vocabulary stays one unit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fusedhead.graph.reasons import Escape
from fusedhead.graph.sizes import same_size
from fusedhead.ir.logits import HIDDEN, LOGITS_LIKE, Logits, LogitsLike, RowStep, detached, logits_of
from fusedhead.rules.reasons import NoRule
from fusedhead.rules.table import Context, dimension, register_coverage, rule

aten = torch.ops.aten
register_coverage(
    __name__,
    "rows",
    "views and permutations, before or after the head",
    "views that mix tokens and classes",
)


def moved(value: LogitsLike, val: Tensor, class_dim: int, op: Any, *args: Any, keeps_order: bool = False) -> LogitsLike:
    """``value`` after a row step, for every kind of value made of the logits."""
    if not isinstance(value, Logits):
        of = moved(value.of, val, class_dim, op, *args, keeps_order=keeps_order)
        assert isinstance(of, Logits)
        return replace(value, of=of, val=val)
    step = RowStep(op, args, keeps_order)
    return replace(value, val=val, class_dim=class_dim, row_steps=(*value.row_steps, step))


def class_dim_of(value: Any) -> int:
    if isinstance(value, LOGITS_LIKE):
        return logits_of(value).class_dim
    raise Escape(NoRule.AS_INDEX_OR_SIZE)


def class_dim_after_view(before: Sequence[Any], class_dim: int, after: Sequence[Any]) -> int:
    """Where the vocabulary's dimension is after a view, provided the view keeps it as one unit.

    A view keeps row-major order. Dimension j of the result is the old class dimension exactly when it has its
    length and as many elements come after it (and, with equal totals, before it).
    """
    behind = math.prod(before[class_dim + 1 :])
    for j in reversed(range(len(after))):
        same_length = same_size(after[j], before[class_dim])
        if same_length and same_size(math.prod(after[j + 1 :]), behind):
            return j
    shown = f"{tuple(before)} to {tuple(after)}"
    raise Escape(NoRule.SPLITS_VOCABULARY, sizes=shown, dim=class_dim)


@rule(aten.view.default, aten.reshape.default, aten._unsafe_view.default)
def view(context: Context, value: LogitsLike, size: Sequence[Any]) -> LogitsLike:
    class_dim = class_dim_after_view(value.val.shape, class_dim_of(value), context.val.shape)
    sizes: list[Any] = [HIDDEN if j == class_dim else s for j, s in enumerate(size)]
    symbols = [j for j, s in enumerate(sizes) if isinstance(s, torch.SymInt)]  # they may be sizes of any tensor
    if len(symbols) > 1 or (symbols and -1 in [s for s in sizes if isinstance(s, int)]):
        raise Escape(NoRule.SEVERAL_SYMBOLIC_SIZES)
    for j in symbols:
        sizes[j] = -1
    # a `reshape`: the strides that allow a view of the logits may not allow one of the hidden states
    return moved(value, context.val, class_dim, aten.reshape.default, sizes, keeps_order=True)


@rule(aten.flatten.using_ints)
def flatten(context: Context, value: LogitsLike, start: int = 0, end: int = -1) -> LogitsLike:
    class_dim = class_dim_after_view(value.val.shape, class_dim_of(value), context.val.shape)
    return moved(value, context.val, class_dim, aten.flatten.using_ints, start, end, keeps_order=True)


@rule(aten.contiguous.default, aten.clone.default, aten.alias.default)
def same_rows(context: Context, value: LogitsLike, **_: Any) -> LogitsLike:
    """The value after a copy, which changes no number: the hidden states need no copy."""
    class_dim_of(value)
    return replace(value, val=context.val)


@rule(aten.detach.default)
def detach(context: Context, value: LogitsLike) -> LogitsLike:
    class_dim_of(value)
    return detached(replace(value, val=context.val))


@rule(aten.transpose.int, aten.swapaxes.default, aten.swapdims.default)
def transpose(context: Context, value: LogitsLike, dim0: int, dim1: int) -> LogitsLike:
    order = list(range(value.val.ndim))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return permute(context, value, order)


@rule(aten.t.default)
def t(context: Context, value: LogitsLike) -> LogitsLike:
    return transpose(context, value, 0, 1) if value.val.ndim == 2 else value


@rule(aten.mT.default)
def matrix_transpose(context: Context, value: LogitsLike) -> LogitsLike:
    return transpose(context, value, -2, -1)


@rule(aten.permute.default)
def permute(context: Context, value: LogitsLike, dims: Sequence[int]) -> LogitsLike:
    order = [dimension(dim, value) for dim in dims]
    rows = [dim for dim in order if dim != class_dim_of(value)]
    class_dim = order.index(class_dim_of(value))
    return moved(value, context.val, class_dim, aten.permute.default, order, keeps_order=rows == sorted(rows))


@rule(aten.movedim.int, aten.moveaxis.int)
def movedim(context: Context, value: LogitsLike, source: int, destination: int) -> LogitsLike:
    order = list(range(value.val.ndim))
    order.insert(dimension(destination, value), order.pop(dimension(source, value)))
    return permute(context, value, order)


@rule(aten.unsqueeze.default)
def unsqueeze(context: Context, value: LogitsLike, dim: int) -> LogitsLike:
    class_dim, at = class_dim_of(value), dim % (value.val.ndim + 1)
    return moved(value, context.val, class_dim + (at <= class_dim), aten.unsqueeze.default, at, keeps_order=True)


@rule(aten.squeeze.dim)
def squeeze(context: Context, value: LogitsLike, dim: int) -> LogitsLike:
    class_dim, at = class_dim_of(value), dimension(dim, value)
    if context.val.ndim == value.val.ndim:
        return replace(value, val=context.val)
    if at == class_dim:
        raise Escape(NoRule.SQUEEZES_VOCABULARY)
    return moved(value, context.val, class_dim - (at < class_dim), aten.squeeze.dim, at, keeps_order=True)


@rule(aten.squeeze.default, aten.squeeze.dims)
def squeeze_many(context: Context, value: LogitsLike, dims: Sequence[int] | None = None) -> LogitsLike:
    class_dim = class_dim_after_view(value.val.shape, class_dim_of(value), context.val.shape)
    gone = range(value.val.ndim) if dims is None else [dimension(dim, value) for dim in dims]
    ones = [d for d in gone if same_size(value.val.shape[d], 1)]
    if len(ones) != value.val.ndim - context.val.ndim or class_dim_of(value) in ones:
        raise Escape(NoRule.SQUEEZE_SYMBOLIC)
    return moved(value, context.val, class_dim, aten.squeeze.dims, ones, keeps_order=True)
