"""Reasons why no rule reads an op on logits, or why a head is not fused.

A reason has an id, and a sentence with the names of its fields in braces. Each layer has a table of its own, a subclass
of `Reason`, and ``python -m fusedhead.rules --sentences`` lists all of them. Code compares reasons, never sentences.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from torch.fx import Node

from fusedhead.graph.nodes import where


class Reason(Enum):
    """A reason; its value is the sentence."""

    @property
    def id(self) -> str:
        """A stable name that does not depend on the sentence: "unread/cast"."""
        return f"{type(self).__name__}/{self.name}".lower().replace("_", "-")

    @property
    def template(self) -> str:
        """The sentence with … for each field."""
        return re.sub(r"\{[^}]*\}", "…", self.value)


@dataclass(frozen=True, eq=False)
class Refusal:
    """A reason that applies to a program; ``node``: where in its graph, if at one place."""

    reason: Reason
    sentence: str
    node: Node | None = None

    @property
    def id(self) -> str:
        return self.reason.id

    def placed(self) -> Refusal:
        """The same refusal with the source line of its node in the sentence."""
        return self if self.node is None else replace(self, sentence=f"{self.sentence} (at {where(self.node)})")

    def __str__(self) -> str:
        return self.sentence


def refuse(reason: Reason, node: Node | None = None, **fields: Any) -> Refusal:
    return Refusal(reason, reason.value.format(**fields), node)


class Escape(Exception):
    """Raised by a rule for a use of the logits that it cannot read."""

    def __init__(self, reason: Reason, **fields: Any) -> None:
        self.refusal = refuse(reason, **fields)
        super().__init__(self.refusal.sentence)

    def at(self, node: Node) -> Refusal:
        """The refusal at a node of the graph."""
        return replace(self.refusal, node=node)


def tables() -> list[type[Reason]]:
    """The tables of reasons of all modules that are imported."""
    return Reason.__subclasses__()
