"""The report of a graph: one record a head, and the graph before and after the pass."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from fusedhead.analysis.cost import mebibytes
from fusedhead.graph.reasons import Reason, refuse
from fusedhead.graph.run_counts import GraphRun, Run
from fusedhead.report.terminal import Overview, columns, rich_text, saved_in_a_step, text


class NotRun(Reason):
    """Why a fused head has computed nothing."""

    NEVER_RUN = "its graph was compiled and never run"
    FAILED = "its graph failed to compile ({error}); what ran instead ran eagerly"


@dataclass
class HeadRecord:
    """One projection onto a vocabulary that a loss or a log-probability depends on, or that the graph returns.

    The fields hold the decision at compile time, and ``run`` the counts since. Tables, logs, traces and pages read only
    these fields.
    """

    fused: bool
    reason: str  # why not, empty when fused
    where: str  # "file.py:123 (lm_head)", the projection's line and module
    computes: str  # "cross_entropy(mean, ignore_index=-100)"
    tokens: int | str  # N, or the name of its symbol
    hidden_size: int
    vocab_size: int
    logits: str  # the decision about them: "never built" | "built" | "deferred"
    engine: str  # the engine and when it computes gradients; empty when not fused
    bytes_logits: int = 0  # bytes of the [N, V] logits: Inductor holds them, or their gradient, at the peak
    workspace_bytes: int = 0  # bytes held at the peak instead of them
    flop: int = 0  # of the matrix products of a step
    forward_only: bool = False  # whether no gradient is taken
    dtype: str = ""  # of the logits
    device: str = ""
    module: str = ""  # "lm_head", "heads.2"
    source: str = ""  # the lines of the program that made the projection, as in a traceback
    likely: bool = True  # whether it is taken for a head: `fusedhead.strict` raises only for these
    least: int = 0  # calls of fewer logits build them, as Inductor would; 0 where their number is fixed
    run: Run = field(default_factory=Run, repr=False)
    sizes: Callable[[int], tuple[int, int]] | None = field(default=None, repr=False)  # N -> both numbers of bytes
    tokens_of: Callable[[tuple[int, ...]], int] | None = field(default=None, repr=False)  # a call's sizes -> N

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled or copied: the record as seen so far, without the graph's own functions."""
        return vars(self.seen()) | {"sizes": None, "tokens_of": None}

    @property
    def materialised(self) -> bool:
        """Whether the largest call builds the [N, V] logits."""
        calls, small = self.calls()
        return not self.fused or self.logits == "built" or bool(self.run.built.total) or 0 < calls == small

    def calls(self) -> tuple[int, int]:
        """The calls of the graph, and the number of small ones that built their logits."""
        calls = self.run.graph.calls.items()
        small = 0
        if self.least and self.tokens_of is not None and self.logits != "deferred":
            small = sum(count for key, count in calls if key and self.tokens_of(key) * self.vocab_size < self.least)
        return sum(count for _, count in calls), small

    @property
    def how(self) -> str:
        """The engine, and its price."""
        if not self.fused or self.materialised:
            return self.engine
        held = f"{mebibytes(self.workspace_bytes)} of workspace" if self.workspace_bytes else ""
        work = f"{self.flop / 1e9:,.3g} GFLOP" if self.flop else ""
        return "; ".join(filter(None, (self.engine, ", ".join(filter(None, (held, work))))))

    @property
    def bytes_held(self) -> int:
        """Bytes held at the peak of a step: the logits, or the windows."""
        return self.bytes_logits if self.materialised else self.workspace_bytes

    @property
    def bytes_saved(self) -> int:
        """The bytes that Inductor holds for the logits at the peak of a step, minus those held. May be negative."""
        return self.bytes_logits - self.bytes_held if self.fused else 0

    def seen(self) -> HeadRecord:
        """The record with the sizes of the largest call so far, where the number of tokens is a symbol."""
        counts = [self.tokens_of(key) for key, _ in self.run.graph.calls.items() if key] if self.tokens_of else []
        if not counts or self.sizes is None:
            return self
        bytes_logits, workspace = self.sizes(max(counts))
        flop = self.flop * bytes_logits // max(1, self.bytes_logits)
        span = f"{min(counts)}-{max(counts)}" if min(counts) < max(counts) else str(counts[0])
        tokens = f"{self.tokens} = {span}"
        return replace(self, bytes_logits=bytes_logits, workspace_bytes=workspace, flop=flop, tokens=tokens)

    def ended(self) -> HeadRecord:
        """The record at the end of the program: a graph that never ran has fused nothing."""
        if not self.fused or not self.run.graph.watched or self.run.graph.calls.total:
            return self
        reason = str(refuse(NotRun.NEVER_RUN))
        return replace(self, fused=False, reason=reason, logits="built", engine="")

    def told(self) -> str:
        """The outcome of the logits in a few words."""
        run, (calls, small) = self.run, self.calls()
        if small:
            return f"built in {small} of {plural(calls, 'call')}"
        if not self.fused or self.logits != "deferred" or not (run.deferred.value or run.at_once.total):
            return self.logits
        deferred, built = run.deferred.value, run.built.total
        if not deferred:
            return "built at once"
        return f"built {times(built)} of {deferred}" if built else "deferred, never built"

    def remarks(self) -> list[str]:
        """Further remarks: why it was left, how often deferred logits were answered, and which uses had them built."""
        run = self.run
        notes = [f"because {self.reason}"] if self.reason else []
        if self.fused and self.calls()[1]:
            notes.append(f"calls of fewer than {self.least:,} logits build them, as Inductor would")
        if self.fused and self.logits == "deferred":
            counts = (("answered", run.answered.value), ("handed to another compiled function", run.passed.value))
            notes += [f"{how} {times(count)}" for how, count in counts if count]
            notes += [f"built {times(count)} for {use}" for use, count in run.built.items() if count]
            notes += [f"built at once {times(count)}: {why}" for why, count in run.at_once.items() if count]
        return notes

    def __str__(self) -> str:
        shape = f"N={self.tokens} D={self.hidden_size} V={self.vocab_size}"
        if not self.fused:
            return f"left   {self.where}  {shape}: {self.reason}"
        said = "; ".join(("", *self.remarks()))
        return (
            f"fused  {self.where}  {self.computes}  {shape}  logits {self.told()}  {self.how}  "
            f"{mebibytes(self.bytes_saved)} saved{said}"
        )


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
        from fusedhead.report.export import data  # imported here, since it imports this file

        return data(self.overview())

    def __str__(self) -> str:
        shown = text(self.overview(), columns(sys.stdout))
        return "\n".join([shown, *(pass_table(self.passes) if self.shows_passes else ())])

    def __repr__(self) -> str:
        fused = sum(head.fused for head in self.heads)
        graphs = plural(self.graphs, "graph")
        return f"<fusedhead.Report: {plural(fused, 'head')} fused, {len(self.heads) - fused} left, in {graphs}>"

    def _repr_html_(self) -> str:
        from fusedhead.report.html import notebook

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


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")


def times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"
