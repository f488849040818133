"""Reading ``z[mask] = number`` and ``z[mask, y[mask]] = number``: masked tokens get one number, in all classes or in
one.

The first is a ``where``. The second writes a class of each token, as `scatter` does, and writes the old number outside
of the mask. Both treat tokens separately. The interpreter checks that no other name of the memory sees the write.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from fusedhead.graph.nodes import every_dimension, fake, name_of
from fusedhead.graph.reasons import Escape
from fusedhead.graph.sizes import same_shape
from fusedhead.ir.expr import Expr, Plain
from fusedhead.rules.reasons import NoRule
from fusedhead.rules.table import Context
from fusedhead.rules.tokenwise.dispatch import read_by_tokens as by_tokens

aten = torch.ops.aten


def rows_set(node: Node, value: Any, index: Any, number: float) -> Any:
    """The logits after the assignment. Raises Escape where the index is of another kind."""
    mask, chosen = mask_of(value, index)
    column = Plain(Expr(aten.unsqueeze.default, (mask, -1)), mask.val.unsqueeze(-1))

    def read(op: Any, val: Any, *args: Any) -> Any:
        return by_tokens(Context(node, val, op, alone=val), *args)  # none of these ops is one that autocast acts on

    val = value.val
    if chosen is None:
        return read(aten.where.ScalarSelf, val, column, number, value)
    label = chosen.val.new_empty(column.val.shape)
    kept = Expr(aten.where.ScalarOther, (column, Expr(aten.unsqueeze.default, (chosen, -1)), 0))
    at = Plain(kept, label)
    entries = read(aten.gather.default, val.new_empty(label.shape), value, -1, at)
    masked = read(aten.where.ScalarSelf, entries.val, column, number, entries)
    return read(aten.scatter.src, val, value, -1, at, masked)


def mask_of(value: Any, index: Any) -> tuple[Plain, Plain | None]:
    """The mask of tokens, and the class that is set for each of them, None for all."""
    entries = index if isinstance(index, tuple) else (index,)
    first = entries[0] if entries else None
    mask = fake(first) if isinstance(first, Node) else None
    rows = value.val.shape[:-1]
    if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool or not same_shape(mask.shape, rows):
        raise Escape(NoRule.SET_FOR_SOME_TOKENS)
    rest = entries[1:]
    if rest and isinstance(rest[0], Node):
        return Plain(first, mask), labels_of(rest, first)
    if every_dimension(rest, 1) != [slice(None)]:
        raise Escape(NoRule.SET_FOR_SOME_TOKENS)
    return Plain(first, mask), None


def labels_of(rest: tuple, mask: Any) -> Plain:
    """The labels whose masked ones index the classes: ``y`` of ``y[mask]``."""
    (picked,) = rest if len(rest) == 1 else (None,)
    source = picked.args[0] if isinstance(picked, Node) and name_of(picked) == "getitem" else None
    if not isinstance(source, Node) or picked.args[1] is not mask:
        raise Escape(NoRule.SET_FOR_SOME_TOKENS)
    labels = fake(source)
    if not isinstance(labels, torch.Tensor) or labels.dtype != torch.int64 or labels.shape != fake(mask).shape:
        raise Escape(NoRule.SET_FOR_SOME_TOKENS)
    return Plain(source, labels)
