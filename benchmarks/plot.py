"""The picture: time over the floor and extra memory of every contender, by shape and along N, V and D.

A panel along one size appears where at least three cases differ in that size alone (the families ``tokens``,
``vocab`` and ``hidden``, or the default shapes at D = 4096, V = 128256). Reads rows, measures nothing.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks import shapes
from benchmarks.report import FLOOR, Row

AXES = ("tokens", "vocab", "hidden")
NEAR = 2.5  # a ratio of the largest to the smallest time below which they are drawn on a linear scale
LETTER = {"tokens": "N", "vocab": "V", "hidden": "D"}


def series(rows: list[Row], task: str) -> tuple[str, list[Row]]:
    """Rows of one task, dtype and data set (the first there is), without the floor."""
    mine = [r for r in rows if r.task == task and r.contender != FLOOR and r.ms is not None]
    data = mine[0].data if mine else ""
    dtype = shapes.parse(mine[0].case)[0].dtype if mine else ""
    return data, [r for r in mine if r.data == data and shapes.parse(r.case)[0].dtype == dtype]


def along(rows: list[Row], axis: str) -> list[shapes.Case]:
    """The largest set of cases that differ in ``axis`` alone, sorted; empty if there are fewer than three."""
    families: dict[tuple[int, ...], set[shapes.Case]] = {}
    for row in rows:
        case = shapes.parse(row.case)[0]
        fixed = tuple(getattr(case, other) for other in AXES if other != axis)
        families.setdefault(fixed, set()).add(case)
    largest = max(families.values(), key=len, default=set())
    return sorted(largest, key=lambda case: getattr(case, axis)) if len(largest) >= 3 else []


def draw(rows: list[Row], path: Path, device: str, task: str = "train") -> None:
    """Write the picture of one task to ``path`` (png)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    data, chosen = series(rows, task)
    if not chosen:
        return
    panels = [(axis, cases) for axis in AXES if (cases := along(chosen, axis))]
    present = list(dict.fromkeys(shapes.parse(row.case)[0] for row in chosen))
    curves = {case for axis in AXES for case in shapes.FAMILIES[axis]}
    by_shape = [case for case in present if case not in curves] or present
    panels.insert(0, ("shape", by_shape))
    names = list(dict.fromkeys(row.contender for row in chosen))
    by_contender = {(shapes.parse(row.case)[0], row.contender): row for row in chosen}

    widths = [max(2, len(by_shape) * 0.6), *([2.6] * (len(panels) - 1))]
    figure = Figure(figsize=(3 + 2.0 * sum(widths) ** 0.9, 7), layout="constrained")
    grid = figure.subplots(2, len(panels), squeeze=False, width_ratios=widths)
    for column, (axis, cases) in enumerate(panels):
        if axis == "shape":
            places: list[float] = list(range(len(cases)))
        else:
            places = [getattr(case, axis) for case in cases]
        for order, name in enumerate(names):
            for line, measure in enumerate(("ratio", "extra_mib")):
                points = [
                    (place, value)
                    for place, case in zip(places, cases)
                    if (row := by_contender.get((case, name))) and (value := getattr(row, measure)) is not None
                ]
                if measure == "ratio":
                    points = [(place, 1 / value) for place, value in points]
                else:
                    points = [(place, max(value, 0.5)) for place, value in points]
                grid[line][column].plot(
                    [p for p, _ in points],
                    [v for _, v in points],
                    linestyle="" if axis == "shape" else "-",
                    marker="*" if name.startswith("fusedhead") else "osDv^<>pX"[order % 9],
                    markersize=10 if name.startswith("fusedhead") else 6,
                    color=f"C{order % 10}",
                    alpha=0.85,
                    label=name,
                )
        for line, label in enumerate(("time / bare GEMMs", "extra memory, MiB")):
            panel = grid[line][column]
            panel.grid(True, alpha=0.3)
            low, high = panel.get_ylim()
            near = line == 0 and high < NEAR * low  # curves of one size, of which a decade would show one label
            panel.set_yscale("linear" if near else "log")
            panel.yaxis.set_major_formatter(lambda value, place: f"{value:g}")
            labelled = "235" if line == 0 or axis != "shape" else ""  # within a decade: shapes' memory spans many
            panel.yaxis.set_minor_formatter(
                lambda value, place, labelled=labelled: f"{value:g}" if f"{value:e}"[0] in labelled else ""
            )
            if column == 0:
                panel.set_ylabel(label)
            if axis == "shape":
                panel.set_xticks(places, [f"{c.tokens}\n{c.hidden}\n{c.vocab}" for c in cases], fontsize=7)
                panel.set_xlabel("N, D, V")
            else:
                fixed = ", ".join(f"{LETTER[o]} = {getattr(cases[0], o)}" for o in AXES if o != axis)
                panel.set_xscale("log", base=2)
                panel.set_xticks(places, [str(int(place)) for place in places], fontsize=7)
                panel.set_xlabel(f"{LETTER[axis]}   ({fixed})")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, fontsize=8)
    figure.suptitle(f"{task}: {device}, {present[0].dtype}, {data} data", fontsize=10)
    figure.savefig(path, dpi=130)
