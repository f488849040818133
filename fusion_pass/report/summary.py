"""What fusedhead did in a whole program: the reports of all its graphs, folded to one line a head.

A head is compiled many times in a program: for training and for evaluation, for other shapes, by every
thread. The same line with the same outcome is one line here. This file knows reports and nothing of
compiling.
"""

from __future__ import annotations

import dataclasses
import logging
import threading

from fusedhead import compat
from fusedhead.graph.run_counts import Run
from fusedhead.report.report import HeadRecord, Report, heads_table, plural

log = logging.getLogger("fusedhead")


class Summary:
    """Collects reports; thread-safe. ``keep_graphs`` keeps their texts as well."""

    def __init__(self, keep_graphs: bool = False) -> None:
        self.keep_graphs = keep_graphs
        self.guard = threading.Lock()
        self.reports: list[Report] = []

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
        """Tell the log and the structured trace what the end of the program has made of the report."""
        for head in self.heads():
            log.info("%s", head)
        compat.trace_artifact("fusedhead_summary", lambda: str(self))

    def __str__(self) -> str:
        heads, errors = self.heads(), self.errors()
        fused = sum(head.fused for head in heads)
        lines = [
            f"fusedhead: {plural(fused, 'head')} fused, {len(heads) - fused} left, "
            f"in {plural(self.graphs, 'graph')} ({self.seconds:.1f} s in the pass)"
        ]
        if not self.graphs:
            lines.append("  nothing was compiled: the program never ran a torch.compile")
        elif not heads:
            lines.append("  no graph holds a projection together with its loss")
        else:
            lines += heads_table(heads)
        lines += [f"  the pass stepped back: {error}" for error in errors]
        return "\n".join(lines)


def fold(heads: list[HeadRecord]) -> HeadRecord:
    """The records of one head: all token counts, the sizes of the largest, each engine once, all runs together."""
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
