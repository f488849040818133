"""Ops that select rows of the logits or split them; a slice of the vocabulary is a slice of the rows of W.

Row selections are replayed on the hidden states, like views. A rule must refuse an op that acts along the vocabulary.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fusedhead.graph.reasons import Escape
from fusedhead.graph.sizes import same_size
from fusedhead.ir.expr import Plain
from fusedhead.ir.logits import Logits, LogitsLike, piece_of
from fusedhead.ir.stack_parts import picked_part
from fusedhead.ir.terminal import Terminal
from fusedhead.rules.arange_indexing import entry_of_each_row
from fusedhead.rules.reasons import NoRule
from fusedhead.rules.table import Context, dimension, register_coverage, rule
from fusedhead.rules.views import class_dim_of, moved

aten = torch.ops.aten
register_coverage(
    __name__,
    "some of the rows",
    "shift slices, row selection (masks too) before or after the head; pieces of the vocabulary",
    "steps along the vocabulary",
)


@rule(aten.narrow.default, aten.index_select.default)
def move_along_rows(context: Context, value: LogitsLike, dim: int = 0, *args: Any) -> LogitsLike:
    """An op that acts along one dimension and keeps the number of them."""
    class_dim, at = class_dim_of(value), dimension(dim, value)
    if at == class_dim:
        raise Escape(NoRule.ALONG_VOCABULARY, op=context.name)
    if any(not isinstance(a, (int, torch.SymInt, Plain, type(None))) for a in args):
        raise Escape(NoRule.INDEXED_BY_LOGITS, op=context.name)
    return moved(value, context.val, class_dim, context.op, at, *args)


@rule(aten.slice.Tensor)
def slice_(
    context: Context, value: LogitsLike, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> LogitsLike:
    """A slice of rows, or of the vocabulary: then fewer rows of W."""
    if dimension(dim, value) != class_dim_of(value):
        return move_along_rows(context, value, dim, start, end, step)
    if same_size(context.val.shape[class_dim_of(value)], value.val.shape[class_dim_of(value)]):
        return replace(value, val=context.val)
    if not isinstance(value, Logits):
        raise Escape(NoRule.SLICE_OF_PROBABILITIES)
    first, last = value.vocab or (0, int(value.val.shape[value.class_dim]))
    kept = context.val.shape[value.class_dim]
    if step != 1 or not isinstance(kept, int) or not isinstance(start, (int, type(None))):
        raise Escape(NoRule.SLICE_OF_VOCABULARY)
    begin = min((start or 0) % (last - first), last - first) if (start or 0) < 0 else (start or 0)
    cols = piece_of(value.cols, begin, begin + kept)
    return replace(value, val=context.val, vocab=(first + begin, first + begin + kept), cols=cols)


@rule(aten.flip.default)
def flip(context: Context, value: LogitsLike, dims: Sequence[int]) -> LogitsLike:
    at = [dimension(dim, value) for dim in dims]
    if class_dim_of(value) in at:
        raise Escape(NoRule.FLIP_ALONG_VOCABULARY)
    return moved(value, context.val, class_dim_of(value), aten.flip.default, at)


@rule(aten.roll.default)
def roll(context: Context, value: LogitsLike, shifts: Sequence[int], dims: Sequence[int] = ()) -> LogitsLike:
    at = [dimension(dim, value) for dim in dims]
    if class_dim_of(value) in at or not at:
        raise Escape(NoRule.ROLL_ALONG_VOCABULARY)
    return moved(value, context.val, class_dim_of(value), aten.roll.default, list(shifts), at)


@rule(aten.select.int)
def select_row(context: Context, value: LogitsLike, dim: int, index: Any) -> LogitsLike:
    class_dim, at = class_dim_of(value), dimension(dim, value)
    if at == class_dim:
        raise Escape(NoRule.ONE_CLASS)
    part = picked_part(value, context.val, at, index) if isinstance(value, Logits) else None
    return part or moved(value, context.val, class_dim - (at < class_dim), aten.select.int, at, index)


@rule(aten.index.Tensor)
def index_rows(context: Context, value: LogitsLike, indices: Sequence[Any]) -> LogitsLike | Terminal:
    """Rows picked by one integer or boolean tensor, or by integer tensors in neighbouring leading dimensions.

    An index that counts the rows and picks a class in each gives one number a row instead (`arange_indexing`).
    """
    class_dim = class_dim_of(value)
    used = [(d, i) for d, i in enumerate(indices) if i is not None]
    if not used or any(not isinstance(which, Plain) for _, which in used):
        raise Escape(NoRule.INDEX_FROM_LOGITS)
    at, which = used[0]
    if len(used) > 1:
        neighbours = [d for d, _ in used] == list(range(at, at + len(used)))
        if not neighbours or any(i.val.dtype in (torch.bool, torch.uint8) for _, i in used) or class_dim < at:
            raise Escape(NoRule.SEVERAL_INDICES)
        if at + len(used) > class_dim:
            return entry_of_each_row(context, value, [which for _, which in used])
        class_dim += context.val.ndim - value.val.ndim
        return moved(value, context.val, class_dim, aten.index.Tensor, list(indices))
    mask = which.val.dtype in (torch.bool, torch.uint8)
    if at > class_dim or (mask and at + which.val.ndim > class_dim) or at == class_dim:
        raise Escape(NoRule.INDEX_ALONG_VOCABULARY)
    class_dim += (1 if mask else which.val.ndim) - (which.val.ndim if mask else 1)
    return moved(value, context.val, class_dim, aten.index.Tensor, list(indices))


def classes(context: Context, value: LogitsLike, at: int) -> list[LogitsLike]:
    """Pieces of the vocabulary, each the logits of some rows of W."""
    name = context.name.removesuffix("_with_sizes")
    if not isinstance(value, Logits):
        raise Escape(NoRule.CUTS_PROBABILITIES, op=name)
    if all(int(piece.shape[at]) == 1 for piece in context.val):
        raise Escape(NoRule.CUTS_SINGLE_CLASSES, op=name)
    ends = list(itertools.accumulate(int(piece.shape[at]) for piece in context.val))
    bounds = zip([0, *ends], ends)
    return [slice_(replace(context, val=z), value, at, a, b) for z, (a, b) in zip(context.val, bounds)]


def piece_at(value: LogitsLike, piece: Tensor, op: Any, args: tuple, number: int) -> LogitsLike:
    """One of the pieces that ``op`` cuts a tensor into. ``op`` is replayed: the bounds of a piece may be symbols."""
    cut = moved(value, value.val, class_dim_of(value), op, *args)
    return moved(cut, piece, class_dim_of(value), operator.getitem, number)


@rule(aten.split.Tensor, aten.split_with_sizes.default, aten.split.sizes, aten.chunk.default)
def cut(context: Context, value: LogitsLike, sizes: Any, dim: int = 0) -> list[LogitsLike]:
    """An op that cuts a tensor along one dimension and returns the list of pieces."""
    class_dim, at = class_dim_of(value), dimension(dim, value)
    if at == class_dim:
        return classes(context, value, at)
    if not isinstance(value.val.shape[at], int):
        return [piece_at(value, piece, context.op, (sizes, at), i) for i, piece in enumerate(context.val)]
    results, begin = [], 0
    for piece in context.val:
        step = (at, begin, begin + piece.shape[at])
        results.append(moved(value, piece, class_dim, aten.slice.Tensor, *step))
        begin = begin + piece.shape[at]
    return results


@rule(aten.unbind.int)
def unbind_rows(context: Context, value: LogitsLike, dim: int = 0) -> list[LogitsLike]:
    class_dim, at = class_dim_of(value), dimension(dim, value)
    if at == class_dim:
        raise Escape(NoRule.UNBIND_VOCABULARY)
    return [select_row(replace(context, val=piece), value, at, i) for i, piece in enumerate(context.val)]
