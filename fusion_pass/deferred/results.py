"""The outcomes of reading a call on deferred logits: an answer ready to run, or none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor
from torch.fx import GraphModule

from fusedhead.graph.reasons import Refusal


@dataclass(frozen=True, eq=False)
class Whole:
    """The answers are one graph of the leaves, with the gradients taken in its forward sweep."""

    run: GraphModule
    many: Callable[[list], Any] | None  # makes the container of several results


@dataclass(frozen=True, eq=False)
class Swept:
    """The answers are ``tail(leaves, statistics)``, with the statistics of a sweep over ``operands(leaves)``."""

    operands: GraphModule  # leaves -> h, w, y, cols, rows, u
    tail: GraphModule  # leaves, then the statistics that are asked for
    asks: tuple[str, ...]
    transform: str
    memory: int
    many: Callable[[list], Any] | None
    sharing: Sharing


class Relation(NamedTuple):
    """The relation of deferred logits to those that they were made of, where statistics can be carried over."""

    same: bool  # the same rows through the same transform; else rows picked from them
    dims: tuple[int, int]  # where the vocabulary is, before and after


class Sharing(NamedTuple):
    """Which statistics of a sweep other calls may reuse."""

    shareable: frozenset[str]  # statistics that do not depend on this call's own operands; empty: share none
    likely: frozenset[str]  # statistics worth having at once, since another call will probably ask for them
    detached: bool
    relations: tuple[Relation | None, ...]  # of each step of the chain back from the subject, to its predecessor


@dataclass(frozen=True, eq=False)
class Size:
    """Bytes, by the sizes of the leaves."""

    places: tuple[tuple[int, int], ...]  # (leaf, dimension) of each argument
    count: Callable[..., int]

    def of(self, leaves: Sequence[Tensor]) -> int:
        return int(self.count(*(leaves[at].shape[d] for at, d in self.places)))


@dataclass(frozen=True, eq=False)
class TokenByToken:
    """The answers are one graph of the leaves, which runs a token program."""

    run: GraphModule
    many: Callable[[list], Any] | None
    held: Size  # of the logits that are not built


@dataclass(frozen=True, eq=False)
class Wide:
    """The result is as wide as logits with independent rows: it is recorded and not computed.

    ``held``: the logits that a token program on it would not build; None where statistics may serve.
    """

    held: Size | None


@dataclass(frozen=True, eq=False)
class Unread:
    """The call needs the numbers."""

    refusal: Refusal  # for the log


Answer = Whole | Swept | TokenByToken
Outcome = Answer | Wide | Unread


@dataclass(frozen=True, eq=False)
class Guard:
    """The sizes of the leaves for which a reading holds."""

    places: tuple[tuple[int, int], ...]  # (leaf, dimension) of each argument of the test
    test: Callable[..., bool]

    def holds(self, leaves: Sequence[Tensor]) -> bool:
        try:
            return bool(self.test(*(leaves[at].shape[d] for at, d in self.places)))
        except ZeroDivisionError:
            return False


ALWAYS = Guard((), lambda: True)


class DependsOnSizes(Exception):
    """Raised where a reading depends on the sizes: these sizes must be read on their own."""
