"""The record of one head: the decision at compile time, and what its graph has done since."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from fusedhead.analysis.cost import mebibytes
from fusedhead.graph.reasons import Reason, refuse
from fusedhead.graph.run_counts import Run


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
    gathers: bool = False  # whether entries are gathered, whose gradient Inductor scatters into [N, V]
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
        """The state that is pickled or copied: the record as seen so far, without the graph's own functions."""
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


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")


def times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"
