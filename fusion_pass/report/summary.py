"""The summary of a whole program: the reports of all its graphs, folded to one line a head.

A program compiles a head many times: for training and for evaluation, for other shapes, in every thread. Records with
the same source line and outcome are folded into one.
"""

from __future__ import annotations

import dataclasses
import logging
import threading

from fusedhead import compat
from fusedhead.graph.run_counts import Run
from fusedhead.report.head_record import HeadRecord
from fusedhead.report.report import Report
from fusedhead.report.terminal import Overview, saved_in_a_step, text

log = logging.getLogger("fusedhead")
NO_GRAPH = (
    "nothing was compiled: the program never ran a torch.compile, nor, in eager mode, a torch.nn.Linear that is large "
    "enough for a head"
)
NO_HEAD = "no graph holds a projection together with its loss"


class Summary:
    """Collects reports; thread-safe. ``keep_graphs`` keeps their texts as well."""

    def __init__(self, keep_graphs: bool = False) -> None:
        self.keep_graphs = keep_graphs
        self.guard = threading.Lock()
        self.reports: list[Report] = []
        self.notes: list[str] = []  # further sentences about the program

    def add(self, report: Report) -> None:
        if not (self.keep_graphs and report.heads):
            report = dataclasses.replace(report, before="", after="")
        with self.guard:
            self.reports.append(report)

    def heads(self) -> list[HeadRecord]:
        """One record a head and outcome, the fused ones first, the most memory first."""
        folded: dict[tuple[object, ...], list[HeadRecord]] = {}
        for report in self.reports:
            for head in report.heads:
                head = head.seen().ended()
                key = (head.fused, head.reason, head.where, head.computes, head.hidden_size, head.vocab_size)
                folded.setdefault(key, []).append(head)
        return sorted(map(fold, folded.values()), key=lambda head: (not head.fused, -head.bytes_saved))

    def errors(self) -> list[str]:
        return list(dict.fromkeys(error for report in self.reports for error in report.errors))

    @property
    def graphs(self) -> int:
        return sum(report.graphs for report in self.reports)

    @property
    def seconds(self) -> float:
        return sum(report.milliseconds for report in self.reports) / 1e3

    def publish(self) -> None:
        """Write the final report to the log and the structured trace."""
        for head in self.heads():
            log.info("%s", head)
        compat.trace_artifact("fusedhead_summary", lambda: str(self))

    def overview(self) -> Overview:
        """The overview that every form of the report shows."""
        by_graph = [[head.seen().ended() for head in report.heads] for report in self.reports]
        empty = NO_HEAD if self.graphs else NO_GRAPH
        saved = saved_in_a_step(by_graph)
        return Overview(self.heads(), self.graphs, self.seconds, saved, self.errors(), empty, self.notes)

    def __str__(self) -> str:
        return text(self.overview())


def fold(heads: list[HeadRecord]) -> HeadRecord:
    """Fold the records of one head: all token counts, the largest sizes, each engine once, the sum of all runs."""
    largest = max(heads, key=lambda head: head.bytes_logits)
    return dataclasses.replace(
        largest,
        tokens=spans([head.tokens for head in heads]),
        logits="deferred" if any(head.logits == "deferred" for head in heads) else largest.logits,
        engine=once(head.engine for head in heads),
        forward_only=all(head.forward_only for head in heads),
        run=Run.of([head.run for head in heads]),
    )


def once(words: object) -> str:
    return " / ".join(dict.fromkeys(words))  # type: ignore[call-overload]


def spans(counts: list[int | str]) -> int | str:
    """``[16]`` as 16, ``[16, 64, 32]`` as "16-64", with the names of symbolic counts after it."""
    numbers = sorted({count for count in counts if isinstance(count, int)})
    if len(numbers) == 1 and len(set(counts)) == 1:
        return numbers[0]
    words = [str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"] if numbers else []
    return ", ".join(words + sorted({count for count in counts if isinstance(count, str)}))
