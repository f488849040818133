"""Lines up the operands of an op on [N, ...]: which dimensions are tokens, and the form of other tensors.

Raises `Escape` where tokens and classes are combined with each other, or an operand is repeated over tokens.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusedhead.compat import tree_leaves
from fusedhead.graph.reasons import Escape
from fusedhead.graph.sizes import same_size, static
from fusedhead.ir.expr import Expr, Plain
from fusedhead.ir.tokenwise import TokenInput, TokenValue
from fusedhead.rules.table import Context
from fusedhead.rules.tokenwise.reasons import NotByTokens

aten = torch.ops.aten


def known_size(s: Any, what: str) -> int:
    size = static(s)
    if size is None:
        raise Escape(NotByTokens.SYMBOLIC, what=what)
    return size


def constants(x: Any) -> Any:
    """An argument that is no tensor, as a constant."""
    if isinstance(x, Plain) and not isinstance(x.val, Tensor):
        return known_size(x.val, "an argument") if isinstance(x.val, torch.SymInt) else x.val
    if isinstance(x, torch.SymInt):
        return known_size(x, "an argument")
    return x


def heads_among(values: Any) -> frozenset[Any]:
    return frozenset().union(*(v.heads for v in tree_leaves(values) if isinstance(v, TokenValue)))


def from_logits(context: Context, x: Any) -> TokenValue:
    if not isinstance(x, TokenValue):
        raise Escape(NotByTokens.NOT_FIRST, op=context.op)
    return x


def tail_dim(context: Context, x: TokenValue, dim: int) -> int:
    """A dimension of the program's tensor as one of [N, *tail]."""
    d = dim % x.val.ndim
    if not x.tail[d]:
        raise Escape(NotByTokens.OVER_TOKENS, op=context.op)
    return 1 + sum(x.tail[:d])


def several(call: Expr, val: Any, tail: tuple[bool, ...], heads: frozenset[Any]) -> Any:
    """One token value, or a list of them for an op with several results."""
    if isinstance(val, Tensor):
        return TokenValue(call, val, tail, heads)
    return [TokenValue(Expr(operator.getitem, (call, i)), v, tail, heads) for i, v in enumerate(val)]


def common_tail(val: Tensor, operands: Sequence[TokenValue]) -> tuple[bool, ...]:
    """Which dimensions of a pointwise result are its tail. Raises Escape where operands disagree on the tokens."""
    roles: list[bool] = []
    for d in range(val.ndim):
        votes: list[tuple[bool, bool]] = []  # (has its full length, is tail)
        for x in operands:
            at = d - (val.ndim - x.val.ndim)
            if at >= 0:
                votes.append(
                    (same_size(x.val.shape[at], val.shape[d]) and not same_size(x.val.shape[at], 1), x.tail[at])
                )
        firm = {tail for full, tail in votes if full}
        if len(firm) > 1:
            raise Escape(NotByTokens.TOKENS_WITH_CLASSES)
        weak = {tail for _, tail in votes}
        role = firm.pop() if firm else (True in weak if votes else False)
        if not role:
            for x in operands:
                at = d - (val.ndim - x.val.ndim)
                if at < 0 or not same_size(x.val.shape[at], val.shape[d]):
                    if at < 0 and same_size(val.shape[d], 1):
                        continue
                    raise Escape(NotByTokens.LOGITS_REPEATED)
        roles.append(role)
    return tuple(roles)


def lined_up(x: Any, tail: tuple[bool, ...], shape: Sequence[Any], *, by_rows: bool = False) -> Any:
    """An operand of a call whose result has dimensions ``tail`` and ``shape``, in its [N, ...] form."""
    if isinstance(x, Plain) and isinstance(x.val, Tensor):
        return leaf(x, tail, shape, by_rows)
    if not isinstance(x, TokenValue):
        return constants(x)
    if x.tail == tail:
        return x.expr
    padded = [1] * (len(tail) - x.val.ndim) + list(x.val.shape)
    return Expr(aten.reshape.default, (x.expr, (-1, *tails_of(padded, tail))))


def tails_of(shape: Sequence[Any], tail: tuple[bool, ...]) -> list[int]:
    return [known_size(s, "a dimension beside the tokens") for s, is_tail in zip(shape, tail) if is_tail]


def leaf(x: Plain, tail: tuple[bool, ...], shape: Sequence[Any], by_rows: bool) -> TokenInput:
    """A tensor from outside that broadcasts to ``shape``; with ``by_rows`` as [N, ...] even where it need not be."""
    missing = len(tail) - x.val.ndim
    padded = [1] * missing + list(x.val.shape)
    tails = tails_of(padded, tail)
    rows = [d for d, is_tail in enumerate(tail) if not is_tail]
    if not by_rows and all(same_size(padded[d], 1) for d in rows):
        fits = x.val.ndim == 0 or list(x.val.shape) == tails
        return TokenInput(x if fits else Plain(Expr(aten.reshape.default, (x, tails)), x.val.reshape(tails)), False)
    node: Any = x
    if any(not same_size(padded[d], shape[d]) for d in rows):
        if math.prod(tails) > 1:
            raise Escape(NotByTokens.WIDE_OPERAND_REPEATED)
        full = [padded[d] if is_tail else shape[d] for d, is_tail in enumerate(tail)]
        node = Expr(aten.expand.default, (x, [known_size(s, "an operand that is repeated over tokens") for s in full]))
        missing = 0
    present = range(missing, len(tail))
    order = [d - missing for d in present if not tail[d]] + [d - missing for d in present if tail[d]]
    if order != sorted(order):
        node = Expr(aten.permute.default, (node, order))
    if node is not x or x.val.ndim != 1 + len(tails):
        node = Expr(aten.reshape.default, (node, [-1, *tails]))
    return TokenInput(node if isinstance(node, Plain) else Plain(node, x.val), True)
