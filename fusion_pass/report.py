"""What the pass did to a graph, for people and for tests: one record a head, the graph before and after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class HeadRecord:
    """One projection onto a vocabulary that some loss, or log-probability, hangs on."""

    fused: bool
    reason: str  # why not, empty when fused
    where: str  # "file.py:123", the projection's line
    computes: str  # "cross_entropy(mean, ignore_index=-100)"
    tokens: int | str  # N, or the name of its symbol
    hidden_size: int
    vocab_size: int
    logits: str  # "never built" | "built" | "deferred"
    engine: str  # what computes it and when its gradients are taken, with the price; empty when it is not fused
    bytes_saved: int  # bytes of the [N, V] logits that are not built
    bytes_logits: int = 0  # what the [N, V] logits take, built or not
    dtype: str = ""  # of the logits
    device: str = ""
    source: str = ""  # the lines of the program that made the projection, as in a traceback

    def __str__(self) -> str:
        shape = f"N={self.tokens} D={self.hidden_size} V={self.vocab_size}"
        if not self.fused:
            return f"left   {self.where}  {shape}: {self.reason}"
        return (
            f"fused  {self.where}  {self.computes}  {shape}  logits {self.logits}  {self.engine}  "
            f"{self.bytes_saved / 2**20:,.1f} MiB of logits saved"
        )


@dataclass
class Report:
    """Everything the pass has to say about one compiled function (one or several graphs)."""

    heads: list[HeadRecord] = field(default_factory=list)
    before: str = ""
    after: str = ""
    graphs: int = 0
    milliseconds: float = 0.0  # spent in the pass
    errors: list[str] = field(default_factory=list)  # what made the pass step back, if anything

    def extend(self, other: Report) -> None:
        self.heads += other.heads
        self.before += ("\n\n" if self.before else "") + other.before
        self.after += ("\n\n" if self.after else "") + other.after
        self.graphs += other.graphs
        self.milliseconds += other.milliseconds
        self.errors += other.errors

    def __str__(self) -> str:
        fused = sum(head.fused for head in self.heads)
        title = (
            f"fusedhead: {plural(fused, 'head')} fused, {len(self.heads) - fused} left, "
            f"in {plural(self.graphs, 'graph')} ({self.milliseconds:.0f} ms in the pass)"
        )
        lines = [title, *table(self.heads), *(f"the pass stepped back: {error}" for error in self.errors)]
        return "\n".join(lines)


COLUMNS = ("fused", "where", "computes", "N", "D", "V", "logits", "engine", "saved")


def row(head: HeadRecord) -> tuple[str, ...]:
    return (
        "yes" if head.fused else "no",
        head.where,
        head.computes,
        str(head.tokens),
        str(head.hidden_size),
        str(head.vocab_size),
        head.logits,
        head.engine,
        f"{head.bytes_saved / 2**20:,.1f} MiB" if head.fused else "-",
    )


def table(heads: Sequence[HeadRecord]) -> list[str]:
    """The records as aligned columns, each refusal followed by its reason."""
    if not heads:
        return ["no projection with a loss in this graph"]
    rows = [COLUMNS, *map(row, heads)]
    widths = [max(len(r[i]) for r in rows) for i in range(len(COLUMNS))]
    lines = []
    for i, cells in enumerate(rows):
        lines.append("  " + "  ".join(cell.ljust(width) for cell, width in zip(cells, widths)).rstrip())
        if i == 0:
            lines.append("  " + "  ".join("-" * width for width in widths))
        elif heads[i - 1].reason:
            lines.append(f"       because {heads[i - 1].reason}")
    return lines


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")
