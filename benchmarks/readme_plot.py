"""The README's picture: time and memory of a training step of one head over V, out of the committed results.

    python -m benchmarks.readme_plot          # writes docs/images/vocab.svg

It needs no package and gives the same file every time, so that a test holds the picture against the results. Colours
follow the reader's light or dark mode. It measures nothing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks import shapes

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "head.json"
PICTURE = ROOT / "docs" / "images" / "vocab.svg"
TOKENS, HIDDEN = 8192, 2048
WIDTH, HEIGHT, LEFT, TOP, PANEL, DEEP, GAP = 760, 300, 64, 44, 280, 190, 92

STYLE = """
text { font: 12px system-ui, sans-serif; fill: #24292f } .title { font-weight: 600 } .grid { stroke: #d0d7de }
.inductor { stroke: #8c6d1f; fill: #8c6d1f } .fusedhead { stroke: #0969da; fill: #0969da }
.least { stroke: #1a7f37; fill: #1a7f37 } .floor { stroke: #6e7781; fill: #6e7781; stroke-dasharray: 4 4 }
polyline { fill: none !important; stroke-width: 2.2 } circle, text { stroke: none !important }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .grid { stroke: #3d444d }
  .inductor { stroke: #d4a72c; fill: #d4a72c } .fusedhead { stroke: #4493f8; fill: #4493f8 }
  .least { stroke: #3fb950; fill: #3fb950 } .floor { stroke: #9198a1; fill: #9198a1 }
}
"""


class Curve(NamedTuple):
    contender: str  # as in the results
    label: str
    css: str


CURVES = (
    Curve("inductor", "Inductor", "inductor"),
    Curve("fusedhead", "fusedhead", "fusedhead"),
    Curve("fusedhead min", 'memory="min"', "least"),
    Curve("bare GEMMs", "three bare products", "floor"),
)


class Panel(NamedTuple):
    title: str
    field: str  # of a row of the results
    ticks: tuple[float, ...]
    top: float  # the largest value shown
    curves: tuple[Curve, ...]


PANELS = (
    Panel("time of a step, ms", "ms", (0, 10, 20, 30, 40, 50), 55, CURVES),
    Panel("extra memory, MiB", "extra_mib", (0, 1024, 2048, 3072, 4096), 4400, CURVES[:3]),
)


def points(rows: Sequence[dict], contender: str, field: str) -> list[tuple[int, float]]:
    """(V, value) of one contender along the vocabulary, smallest first."""
    wanted = {case.text: case.vocab for case in shapes.FAMILIES["vocab"]}
    assert all((case.tokens, case.hidden) == (TOKENS, HIDDEN) for case in shapes.FAMILIES["vocab"])
    return sorted(
        (wanted[row["case"]], row[field])
        for row in rows
        if row["case"] in wanted and row["contender"] == contender and row["task"] == "train"
    )


def text(x: float, y: float, said: str, css: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{css}" text-anchor="{anchor}">{said}</text>'


def panel(rows: Sequence[dict], what: Panel, left: float) -> list[str]:
    """One pair of axes and its curves."""
    sizes = [case.vocab for case in shapes.FAMILIES["vocab"]]

    def across(vocab: float) -> float:
        return left + PANEL * vocab / sizes[-1]

    def down(value: float) -> float:
        return TOP + DEEP * (1 - value / what.top)

    lines = [text(left, TOP - 20, what.title, "title")]
    for tick in what.ticks:
        y = down(tick)
        lines.append(f'<line class="grid" x1="{left}" y1="{y:.1f}" x2="{left + PANEL}" y2="{y:.1f}"/>')
        lines.append(text(left - 8, y + 4, f"{tick:,}", anchor="end"))
    lines += [text(across(v), TOP + DEEP + 20, f"{v // 1024} K", anchor="middle") for v in sizes]
    for curve in what.curves:
        dots = points(rows, curve.contender, what.field)
        lines.append(drawn(dots, curve, across, down))
    return lines


def drawn(
    at: Sequence[tuple[int, float]], curve: Curve, across: Callable[[float], float], down: Callable[[float], float]
) -> str:
    line = " ".join(f"{across(v):.1f},{down(value):.1f}" for v, value in at)
    dots = "".join(f'<circle cx="{across(v):.1f}" cy="{down(value):.1f}" r="3"/>' for v, value in at)
    return f'<g class="{curve.css}"><polyline points="{line}"/>{dots}</g>'


def legend(y: float) -> list[str]:
    lines, x = [], float(LEFT)
    for curve in CURVES:
        lines.append(f'<g class="{curve.css}"><polyline points="{x:.0f},{y - 4:.0f} {x + 22:.0f},{y - 4:.0f}"/></g>')
        lines.append(text(x + 28, y, curve.label))
        x += 56 + 7.2 * len(curve.label)
    return lines


def picture() -> str:
    """The whole picture, as text."""
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    rows = results["rows"]
    machine = results["runs"][-1]["device"].partition(",")[0]
    said = f"V, vocabulary entries (N = {TOKENS:,} tokens, D = {HIDDEN:,}, bfloat16, {machine})"
    first, second = (panel(rows, what, LEFT + i * (PANEL + GAP)) for i, what in enumerate(PANELS))
    body = [*first, *second, text(WIDTH / 2, TOP + DEEP + 42, said, anchor="middle"), *legend(HEIGHT - 4)]
    described = "Time and extra memory of forward and backward of a head, over the size of the vocabulary"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
            f'aria-label="{described}">',
            f"<title>{described}</title><style>{STYLE}</style>",
            *body,
            "</svg>\n",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.readme_plot", description="Draw the README's picture.")
    parser.add_argument("--out", type=Path, default=PICTURE)
    out = parser.parse_args().out
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(picture(), encoding="utf-8")


if __name__ == "__main__":
    main()
