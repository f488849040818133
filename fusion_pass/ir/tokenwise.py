"""Values that are computed from logits one token at a time, by whatever ops: what a token program is made of.

Where no rule can say what an op makes of the logits in terms of row statistics, it may still be known to treat every
token apart. Such a value is a `TokenValue`: an expression over heads (`HeadInput`) and tensors from outside
(`TokenInput`), in the program's own ATen ops, with the tokens flattened into dimension 0.
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
    """A tensor from outside. ``value`` is [N, ...] where ``by_rows``, else it broadcasts to the tail as it is."""

    value: Plain
    by_rows: bool


@dataclass(frozen=True, eq=False)
class TokenValue:
    """A tensor in the program whose rows are computed apart.

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
        """Whether a row is a few numbers: a result to hand out, where logits are not."""
        vocab = min(head.weight.val.shape[0] for head in self.heads)
        entries = 1
        for size in self.tail_sizes:
            entries *= size
        return entries == 1 or entries * 8 <= vocab


@dataclass(frozen=True, eq=False)
class MaskedRows(TokenValue):
    """The tokens that a mask picks, as all tokens with zeros where it does not hold: only their sum is the same."""

    mask: Plain  # bool, over the first dimensions


@dataclass(frozen=True, eq=False)
class ProgramResult:
    """A row program's result in an expression of the graph, in the shape of ``value.val``."""

    value: TokenValue


def token_values_of(*values: Any) -> Iterator[TokenValue]:
    """The token values that values are, or that their expressions read."""
    for x in walk(*values):
        if isinstance(x, TokenValue):
            yield x
        elif isinstance(x, ProgramResult):
            yield x.value


def inputs_of(
    values: Iterable[TokenValue], into: Callable[[Expr], bool] = lambda expr: True
) -> tuple[list[HeadInput], list[TokenInput]]:
    """The logits and the outside tensors that token values are computed from, each once, in order of appearance.

    ``into``: whether to go on to what an expression reads.
    """
    found = list(walk(*(value.expr for value in values), into=into))
    heads: dict[Logits, HeadInput] = {}
    for x in found:
        if isinstance(x, HeadInput):
            heads.setdefault(x.logits, x)
    return list(heads.values()), [x for x in found if isinstance(x, TokenInput)]


def without_gradient(value: Any) -> Any:
    """A followed value through which no gradient flows; anything else as it is."""
    if isinstance(value, TokenValue):
        return replace(value, expr=Expr(torch.ops.aten.detach.default, (value.expr,)))
    return detached(value)
