"""What the pass reads and what it leaves, as a table for people and as the list of its sentences, out of the code.

The ops of a row are those of the module's rules; the words beside them stand in the module, as its ``FAMILY``.
Sentences are those of every `Reason`. ``python -m fusedhead.rules`` prints both.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from fusedhead.analysis import stacked_heads
from fusedhead.analysis.reasons import Untraced
from fusedhead.canonicalize import duplicate_transposed
from fusedhead.ir.reasons import Reason
from fusedhead.legality import checks, profitability
from fusedhead.rewrite import returned_logits
from fusedhead.rules import RULES, elementwise, gather, indexing, losses, pointwise, projections, reductions, views
from fusedhead.rules.reasons import Unreadable
from fusedhead.rules.table import TOKEN_RULES, Family
from fusedhead.rules.tokenwise import dispatch as tokenwise
from fusedhead.rules.tokenwise.reasons import NotByTokens

PARTS: tuple[ModuleType, ...] = (
    projections, elementwise, pointwise, views, indexing, losses, gather, reductions, tokenwise, stacked_heads,
    duplicate_transposed, returned_logits, checks, profitability,
)  # fmt: skip
TABLES: tuple[type[Reason], ...] = (Unreadable, NotByTokens, Untraced)
HEADER = ("part", "fused", "left to Inductor, with the reason")
MARKERS = ("<!-- python -m fusedhead.rules -->", "<!-- end -->")


def overloads(module: ModuleType) -> list[Any]:
    """The ATen overloads that a module reads: those of its rules, and of its tables of overloads."""
    ruled = [target for target, rule in RULES.items() if rule.__module__ == module.__name__]
    along_classes = [target for target, rules in TOKEN_RULES.items() if any(rule.dim is not None for rule in rules)]
    return along_classes if module is tokenwise else ruled


def ops(module: ModuleType) -> list[str]:
    """Their names as users write them, each once."""
    names = (target._schema.name.removeprefix("aten::") for target in overloads(module))
    return list(dict.fromkeys(name for name in names if not name.startswith(("_", "special_"))))


def cells(module: ModuleType) -> tuple[str, str, str]:
    family: Family = module.FAMILY
    named = ", ".join(f"`{name}`" for name in ops(module))
    return family.part, f"{family.fused}. Ops: {named}" if named else family.fused, family.left


def table() -> str:
    """The table in Markdown."""
    lines = [f"| {' | '.join(line)} |".replace("|  |", "| |") for line in (HEADER, *map(cells, PARTS))]
    return "\n".join([lines[0], "|---|---|---|", *lines[1:]])


def sentences() -> list[str]:
    """The sentences of every `Reason` in the package, sorted, with … for what a program fills in."""
    return sorted({reason.template for table in TABLES for reason in table})


def between_markers(document: str, markers: tuple[str, str], text: str) -> str:
    """The document with ``text`` between two markers of it. Raises ValueError where it lacks one."""
    begin, end = markers
    before, found, rest = document.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"no {begin} ... {end} in the document")
    return f"{before}{begin}\n{text}\n{end}{after}"
