"""The tables of rules: ATen overload → what its result is, given what its arguments are. An op may be read in two ways.

| table         | registered by        | what a rule says                                                          |
|---------------|----------------------|---------------------------------------------------------------------------|
| `RULES`       | ``@rule(...)``       | what the result is of the logits, or that they end there (a `Terminal`)   |
| `TOKEN_RULES` | ``@token_rule(...)`` | its form on [N, ...], one token at a time                                 |

A rule is a function ``(context, *args, **kwargs)`` of the op's arguments, with a value of the pass for each tensor. It
raises `Escape` with a sentence where it cannot read the op, and returns None to let the next rule try. A rule makes a
claim about one op and has a property test of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor
from torch.fx import Node

from fusedhead.graph.reasons import Escape
from fusedhead.graph.sizes import static
from fusedhead.ir.expr import Plain
from fusedhead.ir.logits import LOGITS_LIKE, Logits, LogitsLike, LogProbs, Probs, Value
from fusedhead.rules.reasons import NoRule

Rule = Callable[..., Any]


class TokenRule(NamedTuple):
    """A rule that reads an op token by token; ``dim``: the position of the op's dimension argument, if it has one."""

    read: Rule
    dim: int | None = None


RULES: dict[Any, Rule] = {}
TOKEN_RULES: dict[Any, tuple[TokenRule, ...]] = {}  # several of an overload are tried in order


class CoverageRow(NamedTuple):
    """A row of the table of what is fused, kept beside what makes it true (`fusedhead.report.coverage`)."""

    part: str  # of a program
    fused: str  # what is read, besides the names of the ops, which the listing takes from the rules
    left: str  # what is left to Inductor


COVERAGE: dict[str, CoverageRow] = {}  # by the name of the module whose rules it is about


def register_coverage(module: str, part: str, fused: str, left: str) -> None:
    """Say what the rules of a module cover."""
    COVERAGE[module] = CoverageRow(part, fused, left)


@dataclass(frozen=True, eq=False)
class Context:
    """The facts about an op that its rule may use."""

    node: Node  # the node of the Dynamo graph that the op belongs to
    val: Any  # fake result of the op, in the dtype that the program has there
    op: Any  # the overload
    alone: Any = None  # token by token: fake result of the op run alone, in another dtype where autocast acts
    dim: int | None = None  # token by token: the position of the dimension argument, as registered

    @property
    def name(self) -> str:
        """The op's name as users write it."""
        return str(self.op._schema.name.removeprefix("aten::"))


def rule(*overloads: Any) -> Callable[[Rule], Rule]:
    """Register a function as the rule of these overloads."""

    def register(function: Rule) -> Rule:
        for overload in overloads:
            assert overload not in RULES, f"two rules for {overload}"
            RULES[overload] = function
        return function

    return register


def token_rule(*overloads: Any, dim: int | None = None) -> Callable[[Rule], Rule]:
    """Register a function as a rule that reads these overloads token by token, after those they have already.

    ``dim``: the position of the op's dimension argument. The rule finds arguments up to it filled in.
    """

    def register(function: Rule) -> Rule:
        for overload in overloads:
            TOKEN_RULES[overload] = (*TOKEN_RULES.get(overload, ()), TokenRule(function, dim))
        return function

    return register


def needs_logits(value: Any, op: str) -> Logits:
    """The logits that a rule reads. Raises an Escape that names what it got instead."""
    if isinstance(value, Logits):
        return value
    if isinstance(value, LOGITS_LIKE):
        what = {LogProbs: "log-probabilities", Probs: "probabilities"}.get(type(value), "products of probabilities")
        raise Escape(NoRule.APPLIED_TO, op=op, what=what)
    raise Escape(NoRule.NOT_FIRST, op=op)


def dimension(dim: int, value: LogitsLike) -> int:
    return dim % value.val.ndim


def over_classes(dim: int, logits: Logits, op: str) -> None:
    """Raise Escape unless ``dim`` is the vocabulary's dimension."""
    if logits.val.ndim == 0 or dimension(dim, logits) != logits.class_dim:
        raise Escape(NoRule.OTHER_DIM, op=op, dim=dim, class_dim=logits.class_dim)


def plain_tensor(value: Value | Any, what: str) -> Plain:
    """A tensor that does not come from the logits."""
    if isinstance(value, Plain) and isinstance(value.val, Tensor):
        return value
    raise Escape(NoRule.DEPENDS_ON_LOGITS, what=what)


def vocab_size(logits: Logits) -> int:
    size = static(logits.val.shape[logits.class_dim])
    if size is None:
        raise Escape(NoRule.VOCABULARY_SYMBOLIC)
    return size
