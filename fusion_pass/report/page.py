"""The page that ``fusedhead run --report out.html`` writes, one self-contained HTML file.

The totals come first, then a table of all heads, the left ones first, with a filter and a link to each head's card.
Cards follow (what was left, why and on which line; what was fused, and how), with all bars to one scale, then every
graph that holds a head, before and after. The layout is in ``page.html.jinja`` and ``page.css``; this file collects the
data.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from markupsafe import Markup

from fusedhead.report.export import now
from fusedhead.report.graph_diff import side_by_side
from fusedhead.report.head_record import plural
from fusedhead.report.html import Card, cards, environment, file_text
from fusedhead.report.report import Report
from fusedhead.report.summary import Summary
from fusedhead.report.terminal import Overview, head_name, saved_line
from fusedhead.version import __version__

MODULES_SHOWN = 4  # in the title of a graph


class Graph(NamedTuple):
    title: str
    body: Markup


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
