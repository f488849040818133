"""Rows of `benchmarks.parallel` to read: the printed table, and parallel.md from parallel.json. It measures nothing.

``python -m benchmarks.parallel_report A.json B.json --out DIR`` merges runs into one parallel.json and parallel.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from benchmarks.report import shown

SHOWN_RANKS = (1, 2, 4, 8, 16, 64, 256, 1024)  # of a prediction, in Markdown


@dataclasses.dataclass
class Row:
    """One contender at one case and number of ranks. None where there is no such number."""

    case: str  # NxDxV:dtype, of the whole head
    ranks: int  # that the classes are shared by
    wire: str  # the backend of the process group; "" where collectives are copies of the same size
    contender: str
    ms: float | None = None  # median of the rounds, each that of the slowest rank
    best_ms: float | None = None
    rounds: int = 0
    spread: float | None = None  # (slowest - fastest round) / median
    efficiency: float | None = None  # ms of one GPU's head with V / ranks classes, in this run / ms
    unsent_ms: float | None = None  # the same step with copies in the place of collectives
    alone_ms: float | None = None  # its collectives and nothing else
    model_ms: float | None = None  # the cost model's step: products at the chip's rate, and the wire
    model_wire_ms: float | None = None  # of it the wire
    bytes_a_token: float | None = None  # that a rank sends
    collectives: list[Any] = dataclasses.field(default_factory=list)  # [kind, bytes] as they were called
    extra_mib: float | None = None  # peak less operands, dH and dW, of the rank that has most
    error: dict[str, float] = dataclasses.field(default_factory=dict)  # relative to float64: loss, dh, dw
    note: str = ""

    @property
    def exposed_ms(self) -> float | None:
        """What the wire adds to the step."""
        return None if self.ms is None or self.unsent_ms is None else self.ms - self.unsent_ms

    @property
    def from_shard_ms(self) -> float | None:
        """The model's wire on top of the shard that was measured without one."""
        return None if self.unsent_ms is None or self.model_wire_ms is None else self.unsent_ms + self.model_wire_ms


HEADINGS = ("contender", "ms", "best", "efficiency", "without wire", "wire adds", "wire alone", "model wire",
            "shard + model wire", "model", "bytes/token", "extra MiB", "loss", "dH", "dW", "note")  # fmt: skip


def cells(row: Row) -> tuple[str, ...]:
    """One line of a table, columns as HEADINGS."""
    times = (row.unsent_ms, row.exposed_ms, row.alone_ms, row.model_wire_ms, row.from_shard_ms, row.model_ms)
    return (
        row.contender,
        shown(row.ms, ".2f"),
        shown(row.best_ms, ".2f"),
        shown(row.efficiency, ".3f"),
        *(shown(value, ".2f") for value in times),
        shown(row.bytes_a_token, ",.0f"),
        shown(row.extra_mib, ".0f"),
        *(shown(row.error.get(name), ".1e") for name in ("loss", "dh", "dw")),
        row.note,
    )


def heading(row: Row) -> str:
    wire = row.wire or "no wire: one rank's shard, collectives are copies"
    return f"{row.case}, {row.ranks} shard{'s' * (row.ranks > 1)} ({wire})"


def table(rows: list[Row]) -> str:
    """Aligned text of one case and number of ranks; columns without a number are left out."""
    lines = [HEADINGS, *map(cells, rows)]
    kept = [i for i in range(len(HEADINGS)) if any(line[i] for line in lines[1:])]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADINGS))]
    aligned = ("  ".join(line[i].ljust(widths[i]) if i in (0, 15) else line[i].rjust(widths[i]) for i in kept).rstrip()
               for line in lines)  # fmt: skip
    return "\n".join([heading(rows[0]), *aligned]) if rows else ""


def groups(rows: list[Row]) -> list[list[Row]]:
    """Rows of one case, number of ranks and wire, in the order they came."""
    by_case: dict[Any, list[Row]] = {}
    for row in rows:
        by_case.setdefault((row.case, row.ranks, row.wire), []).append(row)
    return list(by_case.values())


ABOUT = """\
ms: median of shuffled rounds by device events, of the slowest rank. Efficiency: the time of one GPU's head with V /
shards classes in the same run, over ms. Without wire: the same step with copies in the place of its collectives; wire
adds: what is left; wire alone: the collectives by themselves. Model wire: `benchmarks.cost_model` for the latency and
bandwidth of the run; model: its whole step, products at the chip's rate. Extra MiB: peak less operands, dH and dW.
Errors are relative to float64, of the rank with the greatest."""


def markdown(results: dict[str, Any], rows: list[Row]) -> str:
    """Every group as a table, with the origin of the run(s) on top, and the model's tables."""
    out = ["# Heads in shards, measured", ""]
    for run in results["runs"]:
        versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items() if version != "-")
        out += [f"{run['device']}, {run['date']}: `{run['command']}`  ", f"{versions}", ""]
    out.append(ABOUT)
    for members in groups(rows):
        body = [cells(row) for row in members]
        kept = [i for i in range(len(HEADINGS)) if any(line[i] for line in body)]
        out += ["", f"### {heading(members[0])}", "", "| " + " | ".join(HEADINGS[i] for i in kept) + " |"]
        out += ["|---" * len(kept) + "|"]
        out += ["| " + " | ".join(line[i] for i in kept) + " |" for line in body]
    if "collectives" in results:
        link = results["link"]
        out += ["", "### Collectives alone", ""]
        out += [f"Latency {1e6 * link['latency']:.1f} us a step, bandwidth {link['bandwidth'] / 1e9:.0f} GB/s each way "
                f"({link['ranks']} ranks), from the shortest and the longest all-reduce.", ""]  # fmt: skip
        out += ["| collective | bytes | us | model us |", "|---|---|---|---|"]
        for kind, each in results["collectives"].items():
            out += [f"| {kind} | {at['bytes']:,} | {at['us']:.1f} | {at['model_us']:.1f} |" for at in each]
    for case, arrangements in results.get("prediction", {}).items():
        out += ["", f"### {case}, predicted to 1,024 ranks: ms a step, of it the wire; efficiency", ""]
        out += ["| arrangement | " + " | ".join(str(w) for w in SHOWN_RANKS) + " |", "|---" * 9 + "|"]
        for name, each in arrangements.items():
            columns = [each.get(w) or each[str(w)] for w in SHOWN_RANKS]
            out += [f"| {name} | " + " | ".join(map(said, columns)) + " |"]
    return "\n".join(out) + "\n"


def said(p: dict[str, float]) -> str:
    return f"{1e3 * (p['compute'] + p['wire']):.2f}, {1e3 * p['wire']:.2f}; {p['efficiency']:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, help="later ones replace rows, links and predictions")
    parser.add_argument("--out", type=Path, required=True, help="folder for parallel.json and parallel.md")
    arguments = parser.parse_args()
    results: dict[str, Any] = {"runs": []}
    rows: dict[Any, Row] = {}
    for path in arguments.files:
        read = json.loads(path.read_text())
        runs, prediction = results["runs"] + read["runs"], {**results.get("prediction", {}), **read["prediction"]}
        results = {**results, **read, "runs": runs, "prediction": prediction}
        rows.update({(row["case"], row["ranks"], row["wire"], row["contender"]): Row(**row) for row in read["rows"]})
    results["rows"] = [dataclasses.asdict(row) for row in rows.values()]
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "parallel.json").write_text(json.dumps(results, indent=1) + "\n")
    (arguments.out / "parallel.md").write_text(markdown(results, list(rows.values())))
    for members in groups(list(rows.values())):
        print(f"\n{table(members)}")


if __name__ == "__main__":
    main()
