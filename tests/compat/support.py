"""What the package is tested on, as a table for people: ``python -m tests.compat``, ``--write README.md``.

`support.csv` holds a line for each combination that somebody or something has tried, and by what. It is kept by hand,
since no one machine has all of them; `test_support.py` holds it against what the repository installs and allows.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import NamedTuple

FILE = Path(__file__).with_name("support.csv")
MARKERS = ("<!-- python -m tests.compat -->", "<!-- end of support -->")
TESTED = {
    "run": "the tests named have passed on such a machine",
    "compiled": "the kernels compile for the chip, on a machine that has none",
    "self-checked": "compiled, never run by us: on the chip small heads are compared with the torch engine before use",
}


class Row(NamedTuple):
    torch: str
    triton: str
    chip: str
    engine: str
    tested: str  # a key of TESTED
    by: str


def rows() -> list[Row]:
    with FILE.open(encoding="utf-8", newline="") as file:
        return [Row(**line) for line in csv.DictReader(file)]


def table() -> str:
    """The table in Markdown, with the meaning of its words."""
    lines = [Row._fields, ["---"] * len(Row._fields), *rows()]
    meanings = [f"*{word}*: {meaning}." for word, meaning in TESTED.items()]
    return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), "", " ".join(meanings)])
