"""Values that are computed from logits one token at a time, by whatever ops: what a row program is made of.

Where no rule can say what an op makes of the logits in terms of row statistics, it may still be known to treat
every token apart. Such a value is `Rowwise`: an expression over heads (`Seed`) and tensors from outside
(`RowLeaf`), in the program's own ATen ops, with the tokens flattened into dimension 0. This file knows no ops.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from fusedhead.compat import tree_leaves
from fusedhead.ir.logits import Call, Logits, Plain, Projection


@dataclass(frozen=True, eq=False)
class Seed:
    """The logits of a head as the program has them, [N, V]."""

    logits: Logits


@dataclass(frozen=True, eq=False)
class RowLeaf:
    """A tensor from outside. ``value`` is [N, ...] where ``by_rows``, else it broadcasts to the tail as it is."""

    value: Plain
    by_rows: bool


@dataclass(frozen=True, eq=False)
class RowCall:
    """An ATen call, or ``operator.getitem`` of one with several results.

    Leaves of ``args``: Seed, RowLeaf, RowCall, constants.
    """

    op: Any
    args: tuple
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Rowwise:
    """A tensor in the program whose rows are computed apart.

    ``expr`` is [N, *tail]; ``val`` the fake tensor in the program's own shape, of which the dimensions marked in
    ``tail`` are the tail, in order, and the others are tokens, in order.
    """

    expr: Seed | RowLeaf | RowCall
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
class MaskedRows(Rowwise):
    """The tokens that a mask picks, as all tokens with zeros where it does not hold: only their sum is the same."""

    mask: Plain  # bool, over the first dimensions


@dataclass(frozen=True, eq=False)
class RowOutput:
    """A row program's result in an expression of the graph, in the shape of ``value.val``."""

    value: Rowwise


def parts(value: Any) -> Iterator[Rowwise]:
    """The rowwise values that a value is, or that its expression reads."""
    stack = [value]
    while stack:
        x = stack.pop()
        if isinstance(x, Rowwise):
            yield x
        elif isinstance(x, RowOutput):
            yield x.value
        elif isinstance(x, Plain):
            stack.append(x.ref)
        elif isinstance(x, Call):
            stack += tree_leaves((x.args, x.kwargs))
        elif isinstance(x, (list, tuple)):
            stack += x


def detached(value: Any, op: Any) -> Any:
    """A rowwise value through which no gradient flows; ``op`` is the call that detaches."""
    if isinstance(value, Rowwise):
        return replace(value, expr=RowCall(op, (value.expr,)))
    return value


__all__ = ["MaskedRows", "RowCall", "RowLeaf", "RowOutput", "Rowwise", "Seed", "detached", "parts"]
