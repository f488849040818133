"""A side-by-side diff of a graph's text before and after the pass, as rows of HTML."""

from __future__ import annotations

import difflib
from html import escape

AROUND = 4  # unchanged lines shown on each side of a change


def side_by_side(before: str, after: str) -> str:
    """The rows of both texts, with long equal stretches folded."""
    a, b = before.splitlines(), after.splitlines()
    rows: list[str] = []
    for tag, i1, i2, j1, j2 in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        pairs = [
            (i1 + k if i1 + k < i2 else None, j1 + k if j1 + k < j2 else None) for k in range(max(i2 - i1, j2 - j1))
        ]
        shown = [_row(a, b, tag, pair) for pair in pairs]
        if tag == "equal" and len(shown) > 2 * AROUND + 3:
            hidden = "".join(shown[AROUND:-AROUND])
            rows += shown[:AROUND]
            rows.append(f"<details><summary>{len(shown) - 2 * AROUND} equal lines</summary>{hidden}</details>")
            rows += shown[-AROUND:]
        else:
            rows += shown
    return f"<div class=diff>{''.join(rows)}</div>"


def _row(a: list[str], b: list[str], tag: str, pair: tuple[int | None, int | None]) -> str:
    cells = []
    for text, at, mark in ((a, pair[0], "gone"), (b, pair[1], "new")):
        kind = "" if tag == "equal" else f" class={mark if at is not None else 'void'}"
        cells.append(f"<code{kind}>{escape(text[at]) if at is not None else ''}</code>")
    return f"<div class=row>{''.join(cells)}</div>"
