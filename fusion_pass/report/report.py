"""The report of a graph: one record a head, the graph before and after the pass, and the passes that ran."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from fusedhead.graph.reasons import refuse
from fusedhead.graph.run_counts import GraphRun
from fusedhead.report.export import data
from fusedhead.report.head_record import HeadRecord, NotRun, plural
from fusedhead.report.terminal import Overview, columns, rich_text, saved_in_a_step, text


class PassRecord(NamedTuple):
    """One run of one pass of the pipeline."""

    name: str
    edits: int  # nodes made, erased and changed
    milliseconds: float


@dataclass(repr=False)
class Report:
    """The report of one compiled function (one or several graphs).

    ``print(report)`` shows a table, a notebook shows the same in HTML, `to_dict` has all of it as plain data.
    """

    heads: list[HeadRecord] = field(default_factory=list)
    before: str = ""
    after: str = ""
    graphs: int = 0
    milliseconds: float = 0.0  # spent in the pass
    errors: list[str] = field(default_factory=list)  # errors that made the pass give up a graph, or a compilation fail
    run: GraphRun = field(default_factory=GraphRun, repr=False)  # of a single graph
    passes: list[PassRecord] = field(default_factory=list, repr=False)  # of the pipeline, in order
    shows_passes: bool = False  # whether the text ends with their table

    def extend(self, other: Report) -> None:
        self.heads += other.heads
        self.before += ("\n\n" if self.before else "") + other.before
        self.after += ("\n\n" if self.after else "") + other.after
        self.graphs += other.graphs
        self.milliseconds += other.milliseconds
        self.errors += other.errors
        self.passes += other.passes

    def failed(self, error: BaseException) -> None:
        """The report of a graph that could not be compiled."""
        line = next(iter(str(error).strip().splitlines()), "")
        what = f"{type(error).__name__}: {line}" if line else type(error).__name__
        for head in self.heads:
            if head.fused:
                head.fused, head.logits, head.engine = False, "built", ""
                head.reason = str(refuse(NotRun.FAILED, error=what))

    def overview(self) -> Overview:
        """The overview that every form of the report shows."""
        seen = [head.seen() for head in self.heads]
        by_graph: dict[int, list[HeadRecord]] = {}
        for head in seen:
            by_graph.setdefault(id(head.run.graph), []).append(head)
        saved = saved_in_a_step(list(by_graph.values()))
        return Overview(seen, self.graphs, self.milliseconds / 1e3, saved, self.errors)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data (`fusedhead.report.export`), which ``json.dumps`` takes."""
        return data(self.overview())

    def __str__(self) -> str:
        shown = text(self.overview(), columns(sys.stdout))
        return "\n".join([shown, *(pass_table(self.passes) if self.shows_passes else ())])

    def __repr__(self) -> str:
        fused = sum(head.fused for head in self.heads)
        graphs = plural(self.graphs, "graph")
        return f"<fusedhead.Report: {plural(fused, 'head')} fused, {len(self.heads) - fused} left, in {graphs}>"

    def _repr_html_(self) -> str:
        from fusedhead.report.html import notebook  # imported when it is needed: it imports jinja2

        return notebook(self.overview())

    def __rich__(self) -> Any:
        return rich_text(self.overview())


def pass_table(passes: Sequence[PassRecord]) -> list[str]:
    """The passes as lines ``pass | edits | ms``, each pass once, in the order of the first run."""
    edits, milliseconds = Counter[str](), dict[str, float]()
    for name, count, spent in passes:
        edits[name] += count
        milliseconds[name] = milliseconds.get(name, 0.0) + spent
    width = max(map(len, milliseconds), default=0)
    rows = [f"{name:{width}} | {edits[name]:5} | {spent:8.2f}" for name, spent in milliseconds.items()]
    return [f"{'pass':{width}} | edits |       ms", *rows]
