"""The page that ``fusedhead run --report`` writes: one HTML file with nothing outside it.

Totals, one card a head (fused, or left with the reason and the program's own line), and every graph that
holds a head, before and after, side by side. This file knows summaries and HTML, and nothing of compiling.
"""

from __future__ import annotations

import difflib
import platform
from collections.abc import Iterator
from html import escape

import torch

from fusedhead.report.estimates import Estimate, estimate
from fusedhead.report.report import HeadRecord, Report, plural
from fusedhead.report.style import STYLE
from fusedhead.report.summary import Summary

AROUND = 4  # unchanged lines shown on each side of a change


def page(summary: Summary, command: str) -> str:
    """The whole document. ``command`` is what was run, for the title."""
    heads = summary.heads()
    fused = [head for head in heads if head.fused]
    left = [head for head in heads if not head.fused]
    return "".join(
        [
            "<!doctype html><html lang=en><head><meta charset=utf-8>",
            "<meta name=viewport content='width=device-width, initial-scale=1'>",
            f"<title>fusedhead: {escape(command)}</title><style>{STYLE}</style></head><body><main>",
            f"<header><h1>fusedhead</h1><p class=command>{escape(command)}</p>{machine()}</header>",
            totals(summary, fused, left),
            section("Fused heads", [card(head) for head in fused]),
            section("Heads left as they were", [card(head) for head in left]),
            section(
                "Errors inside the pass",
                [f"<p class=error>{escape(error)}</p>" for error in summary.errors()],
            ),
            section("Graphs", list(graphs(summary))),
            "</main></body></html>\n",
        ]
    )


def machine() -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return f"<p class=machine>torch {escape(torch.__version__)} &middot; {escape(device)}</p>"


def section(title: str, parts: list[str]) -> str:
    return f"<section><h2>{title}</h2>{''.join(parts)}</section>" if parts else ""


def totals(summary: Summary, fused: list[HeadRecord], left: list[HeadRecord]) -> str:
    saved = sum(head.bytes_saved for head in fused)
    tiles = [
        (str(len(fused)), "head fused" if len(fused) == 1 else "heads fused"),
        (str(len(left)), "left as it was" if len(left) == 1 else "left as they were"),
        (size(saved), "of memory for logits saved a step (estimate)"),
        (str(summary.graphs), "graph compiled" if summary.graphs == 1 else "graphs compiled"),
        (f"{summary.seconds:.1f} s", "spent in the pass"),
    ]
    if not summary.graphs:
        note = "The program never ran a torch.compile; <code>--compile-eager</code> compiles its models."
    elif not fused and not left:
        note = "No graph holds a projection onto a vocabulary together with its loss."
    else:
        note = ""
    shown = "".join(f"<div class=tile><b>{value}</b><span>{label}</span></div>" for value, label in tiles)
    return f"<div class=tiles>{shown}</div>" + (f"<p class=note>{note}</p>" if note else "")


def card(head: HeadRecord) -> str:
    worth = estimate(head)
    state = "fused" if head.fused else "left"
    sizes = f"N = {head.tokens}, D = {head.hidden_size}, V = {head.vocab_size}"
    facts = [
        ("computes", head.computes),
        ("shape", ", ".join(filter(None, (sizes, head.dtype, head.device)))),
        ("logits", "; ".join((head.told(), *head.remarks()[bool(head.reason) :]))),
    ]
    if head.fused:
        facts += [("how", head.how), ("matrix products", f"{quantity(worth.flop)}FLOP a step")]
    table = "".join(f"<dt>{name}</dt><dd>{escape(str(value))}</dd>" for name, value in facts if value)
    reason = f"<p class=reason>{escape(sentence(head.reason))}</p>" if head.reason else ""
    return (
        f"<article class='card {state}'><h3><span class=badge>{state}</span> {escape(head.where)}</h3>"
        f"{reason}{source(head)}<dl>{table}</dl>{bars(head, worth)}</article>"
    )


def sentence(text: str) -> str:
    return text if text.endswith(".") else text + "."


def source(head: HeadRecord) -> str:
    lines = [line for line in head.source.rstrip().splitlines() if set(line.strip()) - set("^~ ")]
    if not lines:
        return ""
    return f"<pre class=source>{escape(chr(10).join(line[2:] for line in lines[-8:]))}</pre>"


def bars(head: HeadRecord, worth: Estimate) -> str:
    """Memory for the logits without and with fusion, to one scale, and the time of the traffic that is gone."""
    without, kept = worth.bytes_unfused, worth.bytes_left
    if not without:
        return ""
    gone = f"A step makes {size(worth.traffic)} less of reads and writes: {worth.milliseconds:,.2f} ms at "
    gone += f"{worth.bandwidth / 1e9:,.0f} GB/s. " if head.fused else ""
    note = (gone if head.fused and worth.traffic else "") + "Estimates from the sizes."
    scale = 60 / max(without, kept)
    row = "<div class=bar><span>{}</span><i style='width:{:.1f}%' class={}></i><em>{}</em></div>"
    shown = row.format("Inductor", scale * without, "without", size(without))
    shown += row.format("fusedhead", scale * kept, "with", size(kept)) if head.fused else ""
    return f"<div class=bars><p class=fine>Memory for logits in a step</p>{shown}<p class=fine>{note}</p></div>"


def graphs(summary: Summary) -> Iterator[str]:
    """The graphs that hold a head, each once, the changed ones first."""
    seen: set[str] = set()
    for report in sorted((r for r in summary.reports if r.heads), key=lambda r: not any(h.fused for h in r.heads)):
        if report.before not in seen:
            seen.add(report.before)
            yield graph(report, len(seen))


def graph(report: Report, number: int) -> str:
    fused = sum(head.fused for head in report.heads)
    where = ", ".join(dict.fromkeys(head.where for head in report.heads))
    title = f"Graph {number}: {where}, {plural(fused, 'head')} fused, {report.milliseconds:.0f} ms in the pass"
    columns = "<div class=names><span>before</span><span>after</span></div>"
    body = columns + side_by_side(report.before, report.after)
    state = " open" if number == 1 else ""
    return f"<details class=graph{state}><summary>{escape(title)}</summary>{body}</details>"


def side_by_side(before: str, after: str) -> str:
    """A table of both texts, long equal stretches folded away."""
    a, b = before.splitlines(), after.splitlines()
    rows: list[str] = []
    for tag, i1, i2, j1, j2 in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        pairs = [
            (i1 + k if i1 + k < i2 else None, j1 + k if j1 + k < j2 else None) for k in range(max(i2 - i1, j2 - j1))
        ]
        shown = [pair_row(a, b, tag, pair) for pair in pairs]
        if tag == "equal" and len(shown) > 2 * AROUND + 3:
            hidden = "".join(shown[AROUND:-AROUND])
            rows += shown[:AROUND]
            rows.append(f"<details><summary>{len(shown) - 2 * AROUND} equal lines</summary>{hidden}</details>")
            rows += shown[-AROUND:]
        else:
            rows += shown
    return f"<div class=diff>{''.join(rows)}</div>"


def pair_row(a: list[str], b: list[str], tag: str, pair: tuple[int | None, int | None]) -> str:
    cells = []
    for text, at, mark in ((a, pair[0], "gone"), (b, pair[1], "new")):
        kind = "" if tag == "equal" else f" class={mark if at is not None else 'void'}"
        cells.append(f"<code{kind}>{escape(text[at]) if at is not None else ''}</code>")
    return f"<div class=row>{''.join(cells)}</div>"


def size(count: float) -> str:
    """Bytes for people: 1.5 GiB."""
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
