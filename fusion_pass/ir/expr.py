"""Expressions: calls to be emitted, over values of the graph.

| leaf           | what it is                                                    | where it may stand   |
|----------------|---------------------------------------------------------------|----------------------|
| fx `Node`      | a value of the graph                                          | in the graph         |
| `Plain`        | a node or an expression, with its fake value                  | in the graph         |
| `ProgramResult`| a result of a token program                                   | in the graph         |
| `HeadInput`    | the logits [N, V] of a head                                   | in a token program   |
| `TokenInput`   | a tensor that a token program reads                           | in a token program   |
| constant       | a number, a dtype, a size ...                                 | in both              |

Expressions compare by identity, so that a shared one is emitted once; `structure_key` compares by structure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch.fx import Node


@dataclass(frozen=True, eq=False)
class Expr:
    """A call: an ATen overload, or ``operator.getitem`` of one with several results.

    Arguments are expressions, leaves, and lists and tuples of them.
    """

    op: Any
    args: tuple
    kwargs: dict[str, Any] = field(default_factory=dict)

    def mapped(self, of: Callable[[Any], Any]) -> tuple[tuple, dict[str, Any]]:
        """The arguments with ``of`` applied to each expression and leaf."""
        return tuple(map_each(self.args, of)), {name: map_nested(value, of) for name, value in self.kwargs.items()}


@dataclass(frozen=True, eq=False)
class Plain:
    """A value that does not come from logits.

    ``ref`` is an fx Node, an `Expr`, or a constant; ``val`` its fake value.
    """

    ref: Any
    val: Any


def map_each(values: Iterable[Any], of: Callable[[Any], Any]) -> list[Any]:
    return [map_nested(value, of) for value in values]


def map_nested(value: Any, of: Callable[[Any], Any]) -> Any:
    """``of`` applied to a value, or to the elements of a list or tuple."""
    if isinstance(value, list):
        return map_each(value, of)
    return tuple(map_each(value, of)) if isinstance(value, tuple) else of(value)


def walk(*roots: Any, into: Callable[[Expr], bool] = lambda expr: True) -> Iterator[Any]:
    """Every expression, leaf and constant in ``roots``, each object once, in order of appearance.

    ``into``: whether to walk into an expression's arguments.
    """
    seen: set[int] = set()
    stack = list(reversed(roots))
    while stack:
        x = stack.pop()
        if isinstance(x, (list, tuple)):
            stack.extend(reversed(x))
        elif id(x) not in seen:
            seen.add(id(x))
            yield x
            if isinstance(x, Plain):
                stack.append(x.ref)
            elif isinstance(x, Expr) and into(x):
                stack.extend(reversed(x.kwargs.values()))
                stack.append(x.args)


def nodes_of(refs: Iterable[Any]) -> list[Node]:
    """The graph nodes that values are made of, the last one first."""
    return [x for x in walk(*refs) if isinstance(x, Node)][::-1]


def structure_key(ref: Any) -> Any:
    """A key that is equal for expressions with the same nodes and calls."""
    if isinstance(ref, Plain):
        return structure_key(ref.ref)
    if isinstance(ref, Expr):
        args, kwargs = ref.mapped(structure_key)
        return ref.op, hashable(args), tuple((name, hashable(value)) for name, value in kwargs.items())
    return ref if isinstance(ref, Node) else repr(ref)


def hashable(value: Any) -> Any:
    return tuple(map(hashable, value)) if isinstance(value, (list, tuple)) else value
