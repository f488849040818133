"""The report in a terminal: one line a head, named by the path of its module, the left ones first, at 80 columns.

    fusedhead: 1 head fused, 1 left, in 2 graphs (0.3 s in the pass)
      1,353.8 MiB less held for logits at the peak of a step (an estimate from the sizes)
      98.2 MiB of logits are built for heads that were left

             head             N x D x V             answered  built         saved
      left   aux              1024 x 768 x 50304           -      -             -
             because aten.std.correction runs over tokens (at train.py:41)
             train.py:40 (aux)
      fused  lm_head          16384 x 768 x 50304          3      -   1,353.8 MiB
             logits deferred, never built; torch windows: gradients in the forward sweep; ...
             train.py:12 (lm_head): cross_entropy(mean, ignore_index=-100)

Where `rich` is installed `show` adds colours on a terminal; the text is the same.
"""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple, TextIO

from fusedhead.report.head_record import HeadRecord

STATE, NAME, SIZES, COUNT, SAVED = 5, 16, 22, 8, 13  # widths of the columns
INDENT = "  " + " " * STATE + "  "
SHORTEST = 8  # a name's width
NAMED_PLACES = 3  # of heads with one account
IN_COLUMNS = ("answered ", "handed to ")
NARROWEST, WIDEST = 60, 120
NOTHING = "no projection with a loss in this graph"


class TextLine(NamedTuple):
    """One line of the text and its kind: "title", "note", "header", "left", "fused", "reason" or "detail"."""

    kind: str
    text: str


class Overview(NamedTuple):
    """The content of a report: the folded heads of some graphs."""

    heads: Sequence[HeadRecord]
    graphs: int
    seconds: float  # in the pass
    saved: int  # bytes, of all heads of one step (`saved_in_a_step`)
    errors: Sequence[str] = ()
    empty: str = NOTHING  # the sentence where there is no head
    notes: Sequence[str] = ()  # further sentences


def saved_in_a_step(graphs: Sequence[Sequence[HeadRecord]]) -> int:
    """The bytes that a step saves compared with Inductor, for the graph that saves most.

    Graphs may be alternatives (training and evaluation, other shapes) or parts of one step, so that their sum could be
    too large.
    """
    sums = [sum(head.bytes_saved for head in heads) for heads in graphs if any(head.fused for head in heads)]
    return max(sums, default=0)


def left_first(heads: Sequence[HeadRecord]) -> list[HeadRecord]:
    """Heads in the order of the table: left ones by decreasing bytes of logits, then fused ones by their modules'
    paths.
    """
    return sorted(
        heads, key=lambda head: (head.fused, 0 if head.fused else -head.bytes_logits, natural(head_name(head)))
    )


def natural(text: str) -> list[tuple[int, str]]:
    """A sort key that puts heads.9 before heads.10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in text.replace("[", ".").split(".")]


def head_name(head: HeadRecord) -> str:
    """The path of the head's module, or its source line where there is no module."""
    return head.module or head.where


def lines(overview: Overview) -> Iterator[TextLine]:
    heads = left_first(overview.heads)
    fused = sum(head.fused for head in heads)
    seconds = f"{overview.seconds * 1e3:.0f} ms" if overview.seconds < 1 else f"{overview.seconds:.1f} s"
    counts = f"{counted(fused, 'head')} fused, {len(heads) - fused} left"
    yield TextLine("title", f"fusedhead: {counts}, in {counted(overview.graphs, 'graph')} ({seconds} in the pass)")
    if not heads:
        yield TextLine("note", overview.empty)
    if fused:
        yield TextLine("note", saved_line(overview.saved))
    built = sum(head.bytes_logits for head in heads if not head.fused)
    if built:
        yield TextLine("note", f"{size_text(built)} of logits are built for heads that were left")
    if heads:
        yield TextLine("note", "")
        yield TextLine("header", text_cells("", "head", "N x D x V", "answered", "built", "saved"))
    for _, alike in groupby(heads, key=account):
        yield from group(list(alike))
    for error in overview.errors:
        yield TextLine("reason", f"the pass stepped back: {error}")
    for note in overview.notes:
        yield TextLine("note", note)


def account(head: HeadRecord) -> tuple[str, ...]:
    """The text below a head's line. Consecutive heads with the same text share it."""
    how = f"logits {head.told()}; {head.how}" if head.fused else ""
    remarks = [text for text in head.remarks() if not text.startswith(IN_COLUMNS)]
    return (str(head.fused), head.computes, how, *remarks)


def group(heads: Sequence[HeadRecord]) -> Iterator[TextLine]:
    """The lines of heads with one `account`: a line each, then the reason or the engine, then places and losses."""
    _, computes, how, *remarks = account(heads[0])
    kind = "fused" if heads[0].fused else "left"
    for head in heads:
        yield TextLine(kind, row(head))
    for remark in remarks:
        yield TextLine("detail" if heads[0].fused else "reason", remark)
    if how:
        yield TextLine("detail", how)
    places = list(dict.fromkeys(head.where for head in heads))
    more = f" and {len(places) - NAMED_PLACES} more" if len(places) > NAMED_PLACES else ""
    yield TextLine("detail", f"{', '.join(places[:NAMED_PLACES])}{more}: {computes}".removesuffix(": "))


def saved_line(saved: int) -> str:
    """The sentence with the net bytes saved a step."""
    more = "less" if round(saved / 2**20, 1) >= 0 else "more"
    return f"{size_text(abs(saved))} {more} held for logits at the peak of a step (an estimate from the sizes)"


def row(head: HeadRecord) -> str:
    run = head.run
    answered, built = run.answered.value + run.passed.value, run.built.total + run.at_once.total + head.calls()[1]
    saved = size_text(head.bytes_saved) if head.fused else "-"
    sizes = f"{head.tokens} x {head.hidden_size} x {head.vocab_size}"
    return text_cells(
        "fused" if head.fused else "left", head_name(head), sizes, str(answered or "-"), str(built or "-"), saved
    )


def text_cells(state: str, name: str, sizes: str, answered: str, built: str, saved: str) -> str:
    """One line of the table. A long name is cut at its start; long sizes shift the other columns."""
    if len(sizes) + len(name) > NAME + SIZES:
        room = max(SHORTEST, NAME + SIZES - len(sizes))
        name = name if len(name) <= room else "…" + name[1 - room :]
    both = name + " " * max(1, NAME + 1 + SIZES - len(name) - len(sizes)) + sizes
    return f"{state:{STATE}}  {both}  {answered:>{COUNT}}  {built:>5}  {saved:>{SAVED}}"


def text(overview: Overview, width: int | None = None) -> str:
    """All lines. Sentences are wrapped at ``width``; None wraps nothing."""
    return "\n".join(shaped for line in lines(overview) for shaped in shape(line, width))


def shape(line: TextLine, width: int | None) -> list[str]:
    """A line, indented and wrapped."""
    if line.kind == "title":
        return [line.text]
    indent = INDENT if line.kind in ("reason", "detail") else "  "
    if width is None or line.kind in ("left", "fused", "header"):
        return [(indent + line.text).rstrip()]
    if not line.text:
        return [""]
    whole_words: Any = {"break_long_words": False, "break_on_hyphens": False}
    return textwrap.wrap(line.text, width, initial_indent=indent, subsequent_indent=indent, **whole_words)


def columns(file: TextIO) -> int | None:
    """The width of a file's terminal; None where it is no terminal."""
    try:
        return max(NARROWEST, min(WIDEST, os.get_terminal_size(file.fileno()).columns)) if file.isatty() else None
    except (OSError, ValueError, AttributeError):
        return None


STYLES = {
    "title": "bold", "note": "", "header": "dim", "left": "bold yellow", "fused": "green", "reason": "yellow",
    "detail": "dim",
}  # fmt: skip


def rich_text(overview: Overview, width: int | None = None) -> Any:
    """The text as a `rich.text.Text`. Raises ImportError where rich is not installed."""
    from rich.text import Text

    parts = [(shaped + "\n", STYLES[line.kind]) for line in lines(overview) for shaped in shape(line, width)]
    return Text.assemble(*parts, no_wrap=width is None, end="")


def show(overview: Overview, file: TextIO | None = None) -> None:
    """Print to ``file`` (standard error): in colour where it is a terminal and rich is installed."""
    file = file or sys.stderr
    width = columns(file)
    if width is not None and "NO_COLOR" not in os.environ:
        try:
            from rich.console import Console

            Console(file=file, width=width, highlight=False).print(rich_text(overview, width), soft_wrap=True)
            return
        except ImportError:
            pass
    print(text(overview, width), file=file, flush=True)


def counted(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")


def size_text(count: float) -> str:
    """A number of bytes in MiB, so that heads compare."""
    return f"{count / 2**20:,.1f} MiB"
