"""Token values: values computed from logits one token at a time, of which token programs are made.

An op whose result row statistics do not give may still treat every token separately. Its result is a `TokenValue`: an
expression over heads (`HeadInput`) and other tensors (`TokenInput`), in the program's own ATen ops, with the tokens
flattened into dimension 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fusedhead.ir.expr import Expr, Plain, walk
from fusedhead.ir.logits import Logits, Projection, detached


@dataclass(frozen=True, eq=False)
class HeadInput:
    """The logits of a head as the program has them, [N, V]."""

    logits: Logits


@dataclass(frozen=True, eq=False)
class TokenInput:
    """A tensor not made of logits. ``value`` is [N, ...] where ``by_rows``, else it broadcasts to the tail."""

    value: Plain
    by_rows: bool


@dataclass(frozen=True, eq=False)
class TokenValue:
    """A tensor of the program whose rows are computed separately.

    ``expr`` is [N, *tail]; ``val`` the fake tensor in the program's own shape, of which the dimensions marked in
    ``tail`` are the tail, in order, and the others are tokens, in order.
    """

    expr: HeadInput | TokenInput | Expr
    val: Tensor
    tail: tuple[bool, ...]
    heads: frozenset[Projection]

    @property
    def tail_sizes(self) -> tuple[int, ...]:
        return tuple(s for s, is_tail in zip(self.val.shape, self.tail) if is_tail)

    @property
    def small(self) -> bool:
        """Whether a row is a few numbers, so that a program can return it. Logits are not."""
        vocab = min(head.weight.val.shape[0] for head in self.heads)
        entries = 1
        for size in self.tail_sizes:
            entries *= size
        return entries == 1 or entries * 8 <= vocab


@dataclass(frozen=True, eq=False)
class MaskedRows(TokenValue):
    """The tokens that a mask picks, held as all tokens with zeros outside the mask. Only sums over tokens are equal."""

    mask: Plain  # bool, over the first dimensions


@dataclass(frozen=True, eq=False)
class ProgramResult:
    """A token program's result in an expression of the graph, in the shape of ``value.val``."""

    value: TokenValue


def token_values_of(*values: Any) -> Iterator[TokenValue]:
    """The token values among values and in their expressions."""
    for x in walk(*values):
        if isinstance(x, TokenValue):
            yield x
        elif isinstance(x, ProgramResult):
            yield x.value


def inputs_of(
    values: Iterable[TokenValue], into: Callable[[Expr], bool] = lambda expr: True
) -> tuple[list[HeadInput], list[TokenInput]]:
    """The logits and other tensors that token values are computed from, each once, in order of appearance.

    ``into``: whether to walk into an expression's arguments.
    """
    leaves = list(walk(*(value.expr for value in values), into=into))
    heads: dict[Logits, HeadInput] = {}
    for x in leaves:
        if isinstance(x, HeadInput):
            heads.setdefault(x.logits, x)
    return list(heads.values()), [x for x in leaves if isinstance(x, TokenInput)]


def without_gradient(value: Any) -> Any:
    """A followed value without gradient; any other value unchanged."""
    if isinstance(value, TokenValue):
        return replace(value, expr=Expr(torch.ops.aten.detach.default, (value.expr,)))
    return detached(value)
