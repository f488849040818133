"""``z[..., columns] = number``: an in-place statement that is the same for every token.

It becomes a `masked_fill` of the logits, for which there is a rule. The interpreter checks that no other name of the
memory sees the write. `mask_assignment` reads assignments to some tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from fusedhead.graph.nodes import every_dimension, fake
from fusedhead.graph.reasons import Escape
from fusedhead.ir.expr import Expr, Plain
from fusedhead.ir.logits import Logits
from fusedhead.ir.tokenwise import TokenValue
from fusedhead.rules import RULES
from fusedhead.rules.mask_assignment import rows_set
from fusedhead.rules.reasons import NoRule
from fusedhead.rules.table import Context
from fusedhead.rules.tokenwise.dispatch import read_by_tokens as by_tokens

aten = torch.ops.aten


def columns_set(node: Node, logits: Any) -> Any:
    """The logits after ``z[..., columns] = number``, columns being a slice, an index or a mask along the vocabulary."""
    _, index, number = node.args
    if not isinstance(logits, (Logits, TokenValue)) or not isinstance(number, (int, float)):
        raise Escape(NoRule.SET_TO_OTHER)
    ndim = logits.val.ndim
    parts = every_dimension(index, ndim)
    tails = [logits.class_dim] if isinstance(logits, Logits) else [d for d, t in enumerate(logits.tail) if t]
    if len(tails) != 1:
        raise Escape(NoRule.SET_FOR_SOME_TOKENS)
    if tails == [ndim - 1] and starts_with_a_mask(index):
        return rows_set(node, logits, index, number)
    if len(parts) != ndim or any(p != slice(None) for d, p in enumerate(parts) if d != tails[0]):
        raise Escape(NoRule.SET_FOR_SOME_TOKENS)
    size, chosen = logits.val.shape[tails[0]], parts[tails[0]]
    mask, shape = column_choice(chosen, int(size), logits.val), [-1 if d == tails[0] else 1 for d in range(ndim)]
    mask = Plain(Expr(aten.reshape.default, (mask, shape)), mask.val.reshape(shape))
    fill = aten.masked_fill.Scalar
    context = Context(node, logits.val, fill, alone=logits.val)
    if isinstance(logits, Logits):
        return RULES[fill](context, logits, mask, number)
    return by_tokens(context, logits, mask, number)


def starts_with_a_mask(index: Any) -> bool:
    """Whether an index begins with truth values, which may stand for several dimensions."""
    first = index[0] if isinstance(index, tuple) and index else index
    return isinstance(first, Node) and isinstance(fake(first), torch.Tensor) and fake(first).dtype == torch.bool


def column_choice(chosen: Any, size: int, like: torch.Tensor) -> Plain:
    """Which of ``size`` columns an index means, as a mask [size]."""
    none = Expr(aten.zeros.default, ([size],), {"dtype": torch.bool, "device": like.device})
    val = like.new_empty(size, dtype=torch.bool)
    bounds = (chosen.start, chosen.stop, chosen.step) if isinstance(chosen, slice) else ()
    if isinstance(chosen, slice) and all(p is None or isinstance(p, int) for p in bounds):
        length = len(range(*chosen.indices(size)))
        some = Expr(aten.ones.default, ([length],), {"dtype": torch.bool, "device": like.device})
        start, stop, step = chosen.indices(size)
        return Plain(Expr(aten.slice_scatter.default, (none, some, 0, start, stop, step)), val)
    if isinstance(chosen, int) and not isinstance(chosen, bool):
        at = chosen % size
        some = Expr(aten.ones.default, ([1],), {"dtype": torch.bool, "device": like.device})
        return Plain(Expr(aten.slice_scatter.default, (none, some, 0, at, at + 1, 1)), val)
    if isinstance(chosen, (list, tuple)) and all(type(at) is int for at in chosen):
        numbers = Expr(torch.tensor, (list(chosen),), {"dtype": torch.int64, "device": like.device})
        return Plain(Expr(aten.index_fill.int_Scalar, (none, 0, numbers, True)), val)
    value = fake(chosen) if isinstance(chosen, Node) else None
    if isinstance(value, torch.Tensor) and value.ndim == 1 and value.dtype == torch.bool:
        return Plain(chosen, value)
    if isinstance(value, torch.Tensor) and value.dtype == torch.int64:
        yes = Expr(aten.ones.default, ([],), {"dtype": torch.bool, "device": like.device})
        return Plain(Expr(aten.index_put.default, (none, [chosen], yes)), val)
    raise Escape(NoRule.SET_BY_INDEX)
