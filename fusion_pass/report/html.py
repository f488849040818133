"""The page that ``fusedhead run --report out.html`` writes, one self-contained HTML file, and the table for a notebook.

The totals come first, then a table of all heads, the left ones first, with a filter and a link to each head's card.
Cards follow (what was left, why and on which line; what was fused, and how), with all bars to one scale, then every
graph that holds a head, before and after. The layout is in ``page.html.jinja`` and ``page.css``; this file collects the
data.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from functools import cache
from importlib import resources
from typing import Any, NamedTuple

import torch
from jinja2 import BaseLoader, Environment, StrictUndefined, TemplateNotFound
from markupsafe import Markup

from fusedhead.report.estimates import Estimate, worth
from fusedhead.report.export import now
from fusedhead.report.graph_diff import side_by_side
from fusedhead.report.report import HeadRecord, Report, plural
from fusedhead.report.summary import Summary
from fusedhead.report.terminal import Overview, head_name, left_first, saved_line
from fusedhead.version import __version__

MODULES_SHOWN = 4  # in the title of a graph
SOURCE_LINES = 8


def file_text(name: str) -> str:
    return resources.files("fusedhead.report").joinpath(name).read_text(encoding="utf-8")


class _Files(BaseLoader):
    """Templates beside this file, which also works where the package is in an archive."""

    def get_source(self, environment: Environment, template: str) -> tuple[str, str | None, Any]:
        try:
            return file_text(template), template, lambda: True
        except OSError as error:
            raise TemplateNotFound(template) from error


@cache
def environment() -> Environment:
    templates = Environment(
        loader=_Files(), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    templates.filters.update(size=size, quantity=quantity, sentence=sentence, plural=plural)
    return templates


class Card(NamedTuple):
    """The data of one head's card."""

    number: int
    head: HeadRecord
    name: str
    worth: Estimate
    remarks: list[str]  # besides the reason
    source: str  # the program's own lines


class Graph(NamedTuple):
    title: str
    body: Markup


def cards(heads: Sequence[HeadRecord]) -> list[Card]:
    return [
        Card(at, head, head_name(head), worth(head), head.remarks()[bool(head.reason) :], source(head))
        for at, head in enumerate(left_first(heads), 1)
    ]


def page(summary: Summary, command: str) -> str:
    """The whole document. ``command`` is what was run, for the title."""
    overview = summary.overview()
    shown = cards(overview.heads)
    return (
        environment()
        .get_template("page.html.jinja")
        .render(
            command=command,
            style=Markup(file_text("page.css")),
            versions=version_line(),
            date=now(),
            overview=overview,
            saved=saved_line(overview.saved),
            note=summary_note(summary, overview),
            cards=shown,
            left=[card for card in shown if not card.head.fused],
            fused=[card for card in shown if card.head.fused],
            scale=scale(shown),
            graphs=list(graphs(summary)),
        )
    )


def notebook(overview: Overview) -> str:
    """The totals and the table, for ``_repr_html_``."""
    template = environment().get_template("notebook.html.jinja")
    return template.render(overview=overview, saved=saved_line(overview.saved), cards=cards(overview.heads))


def version_line() -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return f"fusedhead {__version__} · torch {torch.__version__} · Python {platform.python_version()} · {device}"


def summary_note(summary: Summary, overview: Overview) -> str:
    if not summary.graphs:
        return "The program never ran a torch.compile; --compile-eager compiles its models."
    return "" if overview.heads else "No graph holds a projection onto a vocabulary together with its loss."


def scale(shown: Sequence[Card]) -> float:
    """Percent of a card's width a byte, one scale for all bars of the page."""
    most = max((max(card.worth.bytes_unfused, card.worth.bytes_left) for card in shown), default=0)
    return 100 / most if most else 0.0


def source(head: HeadRecord) -> str:
    lines = [line for line in head.source.rstrip().splitlines() if set(line.strip()) - set("^~ ")]
    return "\n".join(line[2:] for line in lines[-SOURCE_LINES:])


def graphs(summary: Summary) -> Iterator[Graph]:
    """The graphs that hold a head, each once, the changed ones first."""
    seen: set[str] = set()
    for report in sorted((r for r in summary.reports if r.heads), key=lambda r: not any(h.fused for h in r.heads)):
        if report.before not in seen:
            seen.add(report.before)
            yield Graph(title(report, len(seen)), Markup(side_by_side(report.before, report.after)))


def title(report: Report, number: int) -> str:
    names = list(dict.fromkeys(map(head_name, report.heads)))
    more = f" and {len(names) - MODULES_SHOWN} more" if len(names) > MODULES_SHOWN else ""
    fused = sum(head.fused for head in report.heads)
    which = ", ".join(names[:MODULES_SHOWN]) + more
    return f"Graph {number}: {which}; {plural(fused, 'head')} fused, {report.milliseconds:.0f} ms in the pass"


def sentence(text: str) -> str:
    return text if text.endswith(".") else text + "."


def size(count: float) -> str:
    """A number of bytes as text: 1.5 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:,.0f} B" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} TiB"


def quantity(count: float) -> str:
    """1.2e12 as "1.2 T"."""
    for unit in ("", "k", "M", "G", "T"):
        if abs(count) < 1000:
            return f"{count:,.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} P"
