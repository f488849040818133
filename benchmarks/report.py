"""Rows to read: the printed table, the Markdown table, and JSON that several runs can be merged from.

``python -m benchmarks.report A.json B.json --out DIR`` merges results of runs split by shape (a later file's
row replaces an earlier one's) and writes head.json, head.md and head.png anew. Nothing is measured here.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

FLOOR = "bare GEMMs"


@dataclasses.dataclass
class Row:
    """One contender at one case, data set and task. None where there is no such number."""

    case: str  # NxDxV:dtype
    data: str
    task: str
    contender: str
    ms: float | None = None  # median of the rounds
    device_ms: float | None = None  # the same where the host is ahead of the device, as in a training step
    best_ms: float | None = None  # fastest round: on a shared machine the steadier number
    rounds: int = 0
    spread: float | None = None  # (slowest - fastest round) / median
    ratio: float | None = None  # floor's ms / ms: 1 is the speed of the bare GEMMs
    over_inductor: float | None = None  # median over rounds of its time over Inductor's in the same round
    extra_mib: float | None = None  # peak less inputs, dH and dW
    error: dict[str, float] = dataclasses.field(default_factory=dict)  # relative, by loss, dh, dw
    over_eager: dict[str, float] = dataclasses.field(default_factory=dict)  # error / eager's error
    note: str = ""  # why a number is missing, or a remark

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.case, self.data, self.task, self.contender


HEADINGS = (
    "contender",
    "ms",
    "device ms",
    "floor/ms",
    "/inductor",
    "extra MiB",
    "loss",
    "dH",
    "dW",
    "/eager: loss",
    "dH",
    "dW",
    "note",
)


def shown(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def cells(row: Row) -> tuple[str, ...]:
    """One line of a table, columns as HEADINGS."""
    return (
        row.contender,
        shown(row.ms, ".2f" if row.ms and row.ms < 100 else ".1f"),
        shown(row.device_ms, ".2f"),
        shown(row.ratio, ".2f"),
        shown(row.over_inductor, ".2f"),
        shown(row.extra_mib, ".1f" if row.extra_mib and abs(row.extra_mib) < 10 else ".0f"),
        *(shown(row.error.get(name), ".1e") for name in ("loss", "dh", "dw")),
        *(shown(row.over_eager.get(name), ".2f") for name in ("loss", "dh", "dw")),
        row.note,
    )


def groups(rows: Iterable[Row]) -> dict[tuple[str, str, str], list[Row]]:
    """Rows by (case, task, data), in the order they came."""
    by_case: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        by_case.setdefault((row.case, row.task, row.data), []).append(row)
    return by_case


def table(rows: list[Row]) -> str:
    """Aligned text of one group."""
    lines = [HEADINGS, *map(cells, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADINGS) - 1)]
    aligned = (
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:-1], widths[1:])), line[-1]]).rstrip()
        for line in lines
    )
    return "\n".join(aligned)


def markdown(results: dict[str, Any], rows: list[Row]) -> str:
    """Every group as a Markdown table under a heading, with the origin of the run(s) on top."""
    out = ["# The head, measured", ""]
    for run in results["runs"]:
        versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items() if version != "-")
        load = f", load {run['load']} at its start" if "load" in run else ""
        out += [f"{run['device']}, {run['date']}{load}: `{run['command']}`  ", f"{versions}", ""]
    out += [
        "ms is a step in a row of its own kind; device ms (of short steps) one that the host has enqueued ahead of",
        "time, behind products as in a model's layers, which leave the device hotter. floor/ms is the speed relative",
        "to the bare products of the task; /inductor the median over the rounds of the time over Inductor's in the",
        "same round; extra MiB is the peak of one step, less inputs, dH and dW; errors are relative to float64, then",
        "over eager's in the same dtype.",
    ]
    for (case, task, data), members in groups(rows).items():
        out += ["", f"### {case} {task}, {data} data", ""]
        out += ["| " + " | ".join(HEADINGS) + " |", "|---" * len(HEADINGS) + "|"]
        out += ["| " + " | ".join(cells(row)) + " |" for row in members]
    return "\n".join(out) + "\n"


def save(folder: Path, runs: list[dict[str, Any]], rows: list[Row]) -> None:
    """Write head.json, head.md and, where matplotlib is, head.png."""
    folder.mkdir(parents=True, exist_ok=True)
    results = {"runs": runs, "rows": [written(row) for row in rows]}
    (folder / "head.json").write_text(json.dumps(results, indent=1, allow_nan=False))
    (folder / "head.md").write_text(markdown(results, rows))
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return
    from benchmarks import plot

    plot.draw(rows, folder / "head.png", runs[-1]["device"] if runs else "")


def written(row: Row) -> dict[str, Any]:
    """A row as JSON can say it: an error that is not finite becomes a word."""
    fields = dataclasses.asdict(row)
    for name in ("error", "over_eager"):
        fields[name] = {k: v if math.isfinite(v) else str(v) for k, v in fields[name].items()}
    return fields


def load(path: Path) -> tuple[list[dict[str, Any]], list[Row]]:
    """What `save` wrote."""
    results = json.loads(path.read_text())
    rows = [Row(**row) for row in results["rows"]]
    for row in rows:
        for numbers in (row.error, row.over_eager):
            numbers.update({name: float(value) for name, value in numbers.items()})
    return results["runs"], rows


def merged(rows: Iterable[Row]) -> list[Row]:
    """Later rows replace earlier ones of the same key, in the earlier one's place."""
    return list({row.key: row for row in rows}.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder for head.json, head.md, head.png")
    arguments = parser.parse_args()
    runs: list[dict[str, Any]] = []
    rows: list[Row] = []
    for path in arguments.files:
        more_runs, more_rows = load(path)
        runs += more_runs
        rows += more_rows
    rows = merged(rows)
    save(arguments.out, runs, rows)
    for (case, task, data), members in groups(rows).items():
        print(f"\n{case}  {task}  {data}\n{table(members)}")


if __name__ == "__main__":
    main()
