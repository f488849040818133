"""What the package is tested on, as a table for people: ``python -m tests.compat``, ``--write README.md``.

`support.csv` holds a line for each combination that somebody or something has tried, and by what, `pythons.csv` one for
each version of Python. They are kept by hand, since no one machine has all of them; `test_support.py` holds them
against what the repository installs and allows.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parent
MARKERS = ("<!-- python -m tests.compat -->", "<!-- end of support -->")
TESTED = {
    "run": "the tests named have passed on such a machine",
    "compiled": "the kernels compile for the chip, on a machine that has none",
    "self-checked": "compiled, never run by us: on the chip small heads are compared with eager code before use",
    "checked": "syntax and standard library are that Python's, by ruff and mypy, on a machine that lacks it",
}


class Row(NamedTuple):
    torch: str
    triton: str
    chip: str
    engine: str
    tested: str  # a key of TESTED
    by: str


class Python(NamedTuple):
    python: str
    tested: str
    by: str


def rows() -> list[Row]:
    return [Row(**line) for line in _lines("support.csv")]


def pythons() -> list[Python]:
    return [Python(**line) for line in _lines("pythons.csv")]


def _lines(name: str) -> list[dict[str, str]]:
    with (FOLDER / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def table() -> str:
    """Both tables in Markdown, with the meaning of their words."""
    meanings = [f"*{word}*: {meaning}." for word, meaning in TESTED.items()]
    return "\n".join(
        [*_markdown(Row._fields, rows()), "", *_markdown(Python._fields, pythons()), "", " ".join(meanings)]
    )


def _markdown(heading: tuple[str, ...], lines: Sequence[tuple[str, ...]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (heading, ("---",) * len(heading), *lines)]
