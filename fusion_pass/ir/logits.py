"""The domain of the abstract interpreter: a tensor of the graph, relative to the logits of a head.

`Logits`, and `LogProbs`, `Probs` and `ProbTimes` of them, list the steps from a projection to a value. Row steps are
replayed on the hidden states, column steps are compiled into the head. Any other value is `Plain`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fusedhead.ir.expr import Expr, Plain, nodes_of
from fusedhead.kernels.transform.transform import Step


class Hidden:
    """A placeholder in a row step's arguments for the length of the class dimension: D when replayed on h."""

    def __repr__(self) -> str:
        return "D"


HIDDEN = Hidden()


@dataclass(frozen=True, eq=False)
class Projection:
    """z = hidden @ weight.T: the start of one head's logits."""

    node: Node
    hidden: Plain  # [..., D]
    weight: Plain  # [V, D]; its ref may be a transposing Expr
    dtype: torch.dtype  # dtype of the result; operands of another dtype are cast to it (autocast)

    @property
    def products(self) -> tuple[Node, ...]:
        """The nodes of the product."""
        return (self.node,)

    @property
    def operands(self) -> tuple[Plain, ...]:
        return (self.hidden, self.weight)


@dataclass(frozen=True, eq=False)
class RowStep:
    """An op that moves or picks rows. It commutes with the projection, so that it can be replayed on h."""

    op: Any
    args: tuple  # after the tensor; HIDDEN stands for the length of the class dimension
    keeps_order: bool = False  # whether the flattened order of the rows stays


@dataclass(frozen=True, eq=False)
class RowVector:
    """A factor or term with one number a token, applied after the first ``after`` row steps."""

    value: Plain  # broadcasts to the logits at that point; length 1 along the class dimension
    after: int
    shape_of: Any  # fake logits at that point
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
    vocab: tuple[int, int] | None = None  # [first, last) rows of W that are left
    detached: tuple[int, int] | None = None  # len(cols), len(rows) when last detached: those, h and W get no gradient

    @property
    def has_no_gradient(self) -> bool:
        """Whether no gradient flows: detached, and no vector was added since."""
        return self.detached == (len(self.cols), len(self.rows))

    def step(self, val: Tensor, *steps: Step, **changes: Any) -> Logits:
        """These logits after column ``steps``, rounded where the result has a low precision."""
        if val.dtype in (torch.bfloat16, torch.float16):
            steps = (*steps, Step("round", str(val.dtype).removeprefix("torch.")))
        return replace(self, val=val, steps=self.steps + steps, **changes)


@dataclass(frozen=True, eq=False)
class LogProbs:
    """factor · log_softmax(logits) over the class dimension."""

    of: Logits
    val: Tensor
    factor: float = 1.0


@dataclass(frozen=True, eq=False)
class Probs:
    """factor · softmax(logits) over the class dimension."""

    of: Logits
    val: Tensor
    factor: float = 1.0


@dataclass(frozen=True, eq=False)
class ProbTimes:
    """factor · p · x^power elementwise, x the log-probabilities or the logits: the terms of the moments of log p.

    Without ``weighted`` the factor p is still missing.
    """

    of: Logits
    val: Tensor
    log: bool  # x is log p, else the logits
    factor: float = 1.0
    power: int = 1  # 2 for log p alone
    weighted: bool = True


LogitsLike = Logits | LogProbs | Probs | ProbTimes
LOGITS_LIKE = (Logits, LogProbs, Probs, ProbTimes)
Value = Plain | Logits | LogProbs | Probs | ProbTimes


@dataclass(frozen=True, eq=False)
class StackedProjection(Projection):
    """The logits of several heads in one tensor, indexed by its dimension ``dim``: the start of stacked logits.

    ``hidden`` is the stack of their hidden states, for the shapes of their rows; ``weight`` is that of the first.
    """

    parts: tuple[Logits, ...]  # [..., V] each, without row steps
    dim: int

    @property
    def products(self) -> tuple[Node, ...]:
        return tuple(dict.fromkeys(part.head.node for part in self.parts))

    @property
    def operands(self) -> tuple[Plain, ...]:
        return tuple(x for part in self.parts for x in (*part.head.operands, *part.cols))


def piece_of(cols: tuple[Plain, ...], begin: int, end: int) -> tuple[Plain, ...]:
    """A slice of vectors along the vocabulary."""
    return tuple(Plain(Expr(torch.ops.aten.slice.Tensor, (c.ref, 0, begin, end)), c.val[begin:end]) for c in cols)


def logits_of(value: LogitsLike) -> Logits:
    return value if isinstance(value, Logits) else value.of


def sources_of(logits: Logits) -> list[Node]:
    """The graph's nodes that a sweep over these logits reads, besides labels."""
    rows, moves = [row.value for row in logits.rows], [step.args for step in logits.row_steps]
    return nodes_of([logits.head.hidden, logits.head.weight, *logits.cols, *rows, *moves])


def from_the_first(index: Any, size: Any) -> Expr:
    """A non-negative index: -1 becomes the last of ``size``. An index past the end stays as it is."""
    return Expr(torch.ops.aten.where.self, (
        Expr(torch.ops.aten.lt.Scalar, (index, 0)), Expr(torch.ops.aten.add.Tensor, (index, size)), index,
    ))  # fmt: skip


def rows_of_hidden(logits: Logits) -> Any:
    """The hidden states after the logits' row steps: a node or an `Expr` with the logits' rows."""
    ref: Any = logits.head.hidden.ref
    width = logits.head.weight.val.shape[1]
    for step in logits.row_steps:
        args = [[width if s is HIDDEN else s for s in a] if isinstance(a, list) else a for a in step.args]
        ref = Expr(step.op, (ref, *args))
    return ref


def detached(value: Any) -> Any:
    """A followed value without gradient; any other value unchanged."""
    if isinstance(value, Logits):
        return replace(value, detached=(len(value.cols), len(value.rows)))
    if isinstance(value, (LogProbs, Probs, ProbTimes)):
        return replace(value, of=detached(value.of))
    return value


def same_logits(a: Logits, b: Logits) -> bool:
    """Whether two values are the same tensor of logits, up to how their rows are shaped."""
    return (
        a.head is b.head
        and a.val.shape == b.val.shape
        and a.class_dim == b.class_dim
        and row_identity(a) == row_identity(b)
        and [s for s in a.steps if s.op != "round"] == [s for s in b.steps if s.op != "round"]
    )


def row_identity(logits: Logits) -> tuple[Any, ...]:
    """A key of the rows and columns that a sweep reads and their order, without the column steps."""
    steps = list(logits.row_steps)
    while steps and steps[-1].keeps_order:
        steps.pop()
    return tuple(map(id, steps)), tuple(map(id, logits.cols)), tuple(map(id, logits.rows)), logits.vocab
