"""The table of what the pass reads and leaves, and the list of its sentences, generated from the code.

The ops of a row are those of a module's rules, and its text stands in that module; rows about passes stand here. The
sentences are those of every `Reason`. ``python -m fusedhead.rules`` prints both.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

from fusedhead.graph.reasons import tables
from fusedhead.rules import RULES, elementwise, gather, indexing, losses, pointwise, projections, reductions, views
from fusedhead.rules.table import COVERAGE, TOKEN_RULES, CoverageRow
from fusedhead.rules.tokenwise import dispatch as tokenwise

# Parts of a program without a rule of an op.
PASSES = (
    CoverageRow(
        "several pieces, several heads",
        "loops over rows or over pieces of the tokens or of the weight (one sweep for all of them, one gradient of the "
        "weight); logits put together from pieces; heads stacked under one loss",
        "pieces that something else reads or writes to",
    ),
    CoverageRow(
        "losses in both directions",
        "one loss along the classes and one along the other dimension of the same product (CLIP), as two heads",
        "",
    ),
    CoverageRow(
        "returned logits",
        "deferred: no memory, no backward, until something other than a loss asks for them; also of weights that the "
        "graph makes of its parameters, and of stacked heads",
        "logits, or what they are made of, that are written later",
    ),
    CoverageRow(
        "where",
        "training, `no_grad`, `inference_mode`, autocast, activation checkpointing, `nested_compile_region`, gradient "
        "accumulation, several heads, `dynamic=True`, `mode=`",
        "inside `torch.func` transforms; DTensor and other tensor subclasses; where hidden states, weight or labels "
        "are written between the projection and the loss",
    ),
    CoverageRow(
        "size",
        "2²⁰ logits and more, on CUDA 2²²; token by token, logits of 128 MiB and more, on CUDA 4 GiB",
        "smaller heads, and such as would hold more than their logits; each call decides where tokens are a symbol; "
        "`fusedhead.min_logits` moves the limit",
    ),
)


class CoveragePart(NamedTuple):
    """A row of the table: its text, and the module whose rules have the ops."""

    row: CoverageRow
    module: ModuleType | None = None


RULES_OF = (projections, elementwise, pointwise, views, indexing, losses, gather, reductions, tokenwise)
PARTS = (*(CoveragePart(COVERAGE[module.__name__], module) for module in RULES_OF), *map(CoveragePart, PASSES))
HEADER = ("part", "fused", "left to Inductor, with the reason")
MARKERS = ("<!-- python -m fusedhead.rules -->", "<!-- end -->")
SENTENCES = ("<!-- python -m fusedhead.rules --sentences -->", "<!-- end of sentences -->")


def overloads(part: CoveragePart) -> list[Any]:
    """The ATen overloads of a part: those of its module's rules and tables."""
    module = part.module
    if module is None:
        return []
    ruled = [target for target, rule in RULES.items() if rule.__module__ == module.__name__]
    along_classes = [target for target, rules in TOKEN_RULES.items() if any(rule.dim is not None for rule in rules)]
    return along_classes if module is tokenwise else ruled


def ops(part: CoveragePart) -> list[str]:
    """The names of a part's ops as users write them, each once."""
    names = (target._schema.name.removeprefix("aten::") for target in overloads(part))
    return list(dict.fromkeys(name for name in names if not name.startswith(("_", "special_"))))


def cells(part: CoveragePart) -> tuple[str, str, str]:
    row = part.row
    named = ", ".join(f"`{name}`" for name in ops(part))
    return row.part, f"{row.fused}. Ops: {named}" if named else row.fused, row.left


def table() -> str:
    """The table in Markdown."""
    lines = [f"| {' | '.join(line)} |".replace("|  |", "| |") for line in (HEADER, *map(cells, PARTS))]
    return "\n".join([lines[0], "|---|---|---|", *lines[1:]])


def sentences() -> list[str]:
    """The sentences of every `Reason` in the package, sorted, with … for each field."""
    return sorted({reason.template for table in tables() for reason in table})


def renewed(document: str) -> str:
    """The document with the table and the list of sentences between their markers."""
    listed = "\n".join(f"* {sentence}" for sentence in sentences())
    return between_markers(between_markers(document, MARKERS, table()), SENTENCES, listed)


def between_markers(document: str, markers: tuple[str, str], text: str) -> str:
    """The document with ``text`` between two of its markers. Raises ValueError where it lacks one."""
    begin, end = markers
    before, marker, rest = document.partition(begin)
    _, closed, after = rest.partition(end)
    if not marker or not closed:
        raise ValueError(f"no {begin} ... {end} in the document")
    return f"{before}{begin}\n{text}\n{end}{after}"
