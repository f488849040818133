"""What a tensor in the graph is, relative to the logits of a head: the domain of the abstract interpreter.

`Plain` is anything the pass does not follow. `Logits` and `LogProbs` are followed: they say by which steps a
value came from a projection, so that the steps can be replayed on the hidden states (rows) or compiled into
the head (columns). This file knows no ops and no rules; it must not edit graphs.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fusedhead.kernels.columns import Step


class Escape(Exception):
    """A use of the logits that no rule can read. The message is a sentence for the user."""


class Hidden:
    """Stands in a row step's arguments for the length of the class dimension, D when replayed on h."""

    def __repr__(self) -> str:
        return "D"


HIDDEN = Hidden()


@dataclass(frozen=True, eq=False)
class Call:
    """An ATen call to be emitted: leaves of `args` are fx Nodes, other Calls, or constants."""

    op: Any
    args: tuple
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Plain:
    """A value the pass does not follow.

    ``ref`` is an fx Node, a `Call`, or a constant; ``val`` its fake value.
    """

    ref: Any
    val: Any


@dataclass(frozen=True, eq=False)
class Projection:
    """z = hidden @ weight.T: where the logits of one head begin."""

    node: Node
    hidden: Plain  # [..., D]
    weight: Plain  # [V, D]; its ref may be a transposing Call
    dtype: torch.dtype  # of the projection's result; operands are cast to it when they differ (autocast)


@dataclass(frozen=True, eq=False)
class RowStep:
    """An op that moves or picks rows: it commutes with the projection, so it is replayed on h."""

    op: Any
    args: tuple  # after the tensor; HIDDEN stands for the length of the class dimension
    keeps_order: bool = False  # the flattened order of the rows is the same before and after


@dataclass(frozen=True, eq=False)
class RowVector:
    """A factor or term with one number a token, as it was when `after` row steps had been taken."""

    value: Plain  # broadcasts to the logits of that moment, length 1 along the class dimension
    after: int
    shape_of: Any  # fake logits of that moment
    class_dim: int


@dataclass(frozen=True, eq=False)
class Logits:
    """The logits of a head after some row steps and column steps.

    ``val`` is the fake tensor at this point; its dimension ``class_dim`` runs over the vocabulary, the others
    are rows.
    """

    head: Projection
    val: Tensor
    class_dim: int
    row_steps: tuple[RowStep, ...] = ()
    steps: tuple[Step, ...] = ()
    cols: tuple[Plain, ...] = ()
    rows: tuple[RowVector, ...] = ()
    vocab: tuple[int, int] | None = None  # first and one past the last row of W that is left
    detached: bool = False

    def step(self, val: Tensor, *steps: Step, **changes: Any) -> Logits:
        """These logits after column ``steps``; a result in a low precision is rounded there."""
        if val.dtype in (torch.bfloat16, torch.float16):
            steps = (*steps, Step("round", str(val.dtype).removeprefix("torch.")))
        return replace(self, val=val, steps=self.steps + steps, **changes)


@dataclass(frozen=True, eq=False)
class LogProbs:
    """factor · log_softmax(logits) over the class dimension."""

    of: Logits
    val: Tensor
    factor: float = 1.0


Followed = Logits | LogProbs
Value = Plain | Logits | LogProbs


def logits_of(value: Followed) -> Logits:
    return value if isinstance(value, Logits) else value.of
