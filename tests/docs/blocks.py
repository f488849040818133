"""The code blocks of README.md and docs/: where they stand, what they are, and what they need.

A block is fenced, or indented by four spaces after a blank line. ``<!-- needs: a, b -->`` on the line above says which
packages a block needs besides the package's own.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
FENCED = re.compile(r"(?:<!-- needs: (?P<needs>[^>]*) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```", re.M | re.S)
INDENTED = re.compile(r"(?<=\n\n)(?:    \S.*\n|    +.*\n)+")


class Block(NamedTuple):
    page: str
    line: int
    language: str  # "python", "diff", ... ; "" for an indented one
    text: str
    needs: tuple[str, ...] = ()

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"


def pages() -> list[Path]:
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path) -> list[Block]:
    """All code blocks of a page, in order."""
    text, name = page.read_text(encoding="utf-8"), page.relative_to(ROOT).as_posix()
    results = []
    for match in FENCED.finditer(text):
        needs = tuple(part.strip() for part in (match["needs"] or "").split(",") if part.strip())
        line = text.count("\n", 0, match.start("text")) + 1
        results.append(Block(name, line, match["language"], match["text"], needs))
    rest = FENCED.sub(lambda match: "\n" * match[0].count("\n"), text)
    for match in INDENTED.finditer(rest):
        lines = "".join(line[4:] for line in match[0].splitlines(keepends=True))
        results.append(Block(name, rest.count("\n", 0, match.start()) + 1, "", lines))
    return sorted(results, key=lambda block: block.line)
