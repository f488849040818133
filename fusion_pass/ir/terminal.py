"""A terminal: the node at which the logits end and a few numbers a row remain.

A rule returns a `Terminal`. The rewriter takes its labels, emits the head's sweep, and lets it build the result from
row statistics with ordinary ATen calls on [N] vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from torch.fx import Node

from fusedhead.ir.builder import Emit
from fusedhead.ir.expr import Plain
from fusedhead.ir.logits import Logits


class Kind(Enum):
    """The kind of a terminal. Its value is shown in `Terminal.computes`."""

    LOSS = "loss"
    GATHER = "gather"  # entries of the logits or of their log-probabilities
    INDEX = "index"  # entries, by an index that counts the rows
    LSE = "logsumexp"
    ENTROPY = "entropy"
    SUM = "sum"
    MAX = "max"
    ARGMAX = "argmax"


Labels = Callable[[Emit], Node]  # emits [N, K] int64 labels in [0, V)


@dataclass(frozen=True, eq=False)
class Statistics:
    """The nodes that hold a head's statistics for one terminal. N tokens, K labels a row."""

    lse: Node  # [N] float32
    picked: Node | None  # [N, K] float32
    sum: Node | None  # [N] float32
    row_sizes: Callable[[], list[Any]]  # emits the rows' shape before it was flattened to N: ints and nodes
    by_name: Mapping[str, Node]  # [N] each: what else the terminal wants, by its name in `contract.STATISTICS`


@dataclass(frozen=True, eq=False)
class Terminal:
    """A result of the logits, and how it is computed from statistics. N tokens, K labels a row."""

    logits: Logits
    val: Any  # fake result
    kind: Kind
    computes: str  # for the report only, e.g. "cross_entropy(mean, ignore_index=-100)"
    want: frozenset[str]  # statistics of kernels.contract.STATS besides lse
    result: Callable[[Emit, Statistics], Node]
    labels: Labels | None = None
    label_count: int = 0  # K
    label_key: Any = None  # terminals with equal keys pick the same entries
    label_sources: tuple[Plain, ...] = ()  # the values that the labels are computed from
    weights: Plain | None = None  # [V] weights of the statistic `sum`, None for ones
    sources: tuple[Plain, ...] = ()  # other operands that the result reads
