"""Time, memory and error of a head, for every way of computing it: ``python -m benchmarks.head``.

One process measures all contenders in interleaved rounds, so that the numbers compare. Per case, data set
and task: every contender runs once (its compilation), is compared with float64, has the memory of one step
taken, and then takes part in the rounds. Whatever fails is a row with its reason. ``--precompile`` first
lets one process a case fill the compilers' caches on disk, side by side; nothing is measured there.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks import contenders, data, errors, machine, measure, precompile, report, shapes, tasks
from benchmarks.neighbours import neighbours
from benchmarks.report import FLOOR, Row
from benchmarks.shapes import Case

TURN_SHARE = 0.9  # of the limit, after which no contender is prepared any more


def reason(error: BaseException) -> str:
    """One line that says what went wrong."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    if isinstance(error, contenders.Unavailable):
        return str(error)
    error = getattr(error, "inner_exception", None) or error  # torch.compile's wrapper says little itself
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:160]


class Run:
    """The options of one run and its clock."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = torch.device(options.device)
        self.began = time.monotonic()
        self.deadline = self.began + options.limit
        self.rows: list[Row] = []
        self.runs = [machine.origin(self.device, "benchmarks.head", options.words)]

    def contenders_for(self, task: tasks.Task) -> list[contenders.Contender]:
        if self.options.contenders:
            chosen = [contenders.CONTENDERS[name] for name in self.options.contenders]
        else:
            chosen = [c for c in contenders.CONTENDERS.values() if task.name in c.tasks]
        without = (*self.options.without, "eager") if self.options.once else self.options.without
        return [c for c in chosen if c.name not in without]

    def late(self) -> bool:
        return time.monotonic() > self.began + TURN_SHARE * self.options.limit


def prepare(
    run: Run,
    task: tasks.Task,
    batch: data.Batch,
    truth: errors.Truth | None,
    program: tasks.Program,
    row: Row,
) -> measure.Step:
    """Run a contender's first steps, fill the row's error and memory, return the step to time."""
    resident = measure.resident_bytes(run.device)
    step = tasks.step_of(task, program, batch)
    results = step()
    if truth is not None:
        row.error = errors.errors_of(task, results, truth)
    del results
    if not run.options.once:
        row.extra_mib = measure.extra_bytes(step, run.device, resident) / 2**20
    return step


def group(
    run: Run,
    case: Case,
    kind: str,
    task: tasks.Task,
    batch: data.Batch,
    truth: errors.Truth | None,
    programs: dict[tuple[str, str], tasks.Program],
    bar: tqdm,
) -> list[Row]:
    """All rows of one case, data set and task. ``programs`` keeps what is compiled between data sets."""
    rows: list[Row] = []
    steps: dict[str, measure.Step] = {}
    measure.settle(run.device, case.torch_dtype)
    for contender in run.contenders_for(task):
        name = contender.name
        row = Row(case.text, kind, task.name, name)
        rows.append(row)
        bar.set_postfix_str(f"{case.text} {kind} {task.name}: {name}")
        if run.late():
            row.note = "not run: the time limit of this run"
            continue
        measure.release(run.device)
        begin = time.monotonic()
        try:
            key = task.name, name
            if key not in programs:
                programs[key] = contender.make(task)
            steps[name] = prepare(run, task, batch, truth, programs[key], row)
            row.note = getattr(programs[key], "remark", str)()
        except Exception as error:  # a contender's failure is a result
            row.note = reason(error)
            alive(run, rows, name)
        bar.update()
        tqdm.write(f"  {time.monotonic() - begin:6.1f} s  {name} prepared {row.note}", file=sys.stderr)
    measure.release(run.device)
    if run.options.once:
        return rows
    if steps and FLOOR not in run.options.without:
        steps = {FLOOR: tasks.floor_step(task, batch), **steps}
        rows.insert(0, Row(case.text, kind, task.name, FLOOR, note=f"{task.gemms} products of 2NDV"))
    with neighbours(run.options.neighbours):
        times = measure.interleaved(
            steps,
            run.device,
            run.options.rounds,
            run.options.seconds,
            run.deadline,
            lambda name: bar.set_postfix_str(f"{case.text} {kind} {task.name}: timing {name}"),
        )
    fill(rows, times)
    for row in rows:
        if row.ms and not run.late():
            row.device_ms = measure.device_ms(steps[row.contender], run.device, row.ms)
    return rows


def alive(run: Run, rows: list[Row], name: str) -> None:
    """Stop the run, with what it has, if a contender's failure took the device with it."""
    try:
        measure.wait(run.device)
    except RuntimeError as error:
        report.save(Path(run.options.out), run.runs, run.rows + rows)
        raise SystemExit(f"{name} broke the device ({reason(error)}): go on with --append --without") from error


def fill(rows: list[Row], times: dict[str, list[float]]) -> None:
    """Put the times, and what is relative to the floor and to eager, into the rows."""
    floor = measure.median_ms(times.get(FLOOR, []))
    eager = next((row.error for row in rows if row.contender == "eager"), {})
    for row in rows:
        measure.put_times(row, times.get(row.contender, []))
        if row.ms:
            row.ratio = floor / row.ms if floor else None
            row.over_inductor = measure.median_ratio(times[row.contender], times.get("inductor", []))
        row.over_eager = errors.against(row.error, eager)


def arguments(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.head", description=__doc__)
    names = ", ".join(contenders.CONTENDERS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", help=f"NxDxV[:dtype],... or {', '.join(shapes.FAMILIES)} (default: the device's)")
    parser.add_argument("--contenders", type=lambda s: s.split(","), help=f"of {names} (default: by task)")
    parser.add_argument(
        "--without", type=lambda s: s.split(","), default=[], help=f"leave out contenders, or {FLOOR!r}"
    )
    parser.add_argument("--tasks", type=lambda s: s.split(","), default=list(tasks.TASKS), help="default: all four")
    parser.add_argument("--data", type=lambda s: s.split(","), default=list(data.SETS), help="random,trained,model")
    parser.add_argument("--rounds", type=int, default=9, help="interleaved rounds at most")
    parser.add_argument("--seconds", type=float, default=2.0, help="timing budget of one row")
    parser.add_argument(
        "--neighbours", type=int, default=0, help="other processes that multiply matrices meanwhile, a thread each"
    )
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds for the whole run")
    parser.add_argument("--out", default="benchmarks/results/latest", help="folder of head.json, head.md, head.png")
    parser.add_argument("--append", action="store_true", help="keep the rows that --out has already")
    parser.add_argument("--tf32", action="store_true", help="float32 products by TF32, every contender's")
    parser.add_argument("--no-errors", action="store_true", help="skip the comparison with float64")
    parser.add_argument("--precompile", action="store_true", help="compile all cases side by side first")
    parser.add_argument("--once", action="store_true", help="only call everything once (what --precompile does)")
    options = parser.parse_args(words)
    options.words = words
    unknown = [name for name in options.contenders or () if name not in contenders.CONTENDERS]
    if unknown:
        parser.error(f"no contender is called {unknown[0]!r}; there are {names}")
    return options


def main(words: list[str] | None = None) -> list[Row]:
    options = arguments(sys.argv[1:] if words is None else words)
    if options.tf32:
        torch.set_float32_matmul_precision("high")
    run = Run(options)
    before = Path(options.out) / "head.json"
    if options.append and before.exists():
        runs, run.rows = report.load(before)
        run.runs = runs + run.runs
    cases = shapes.parse(options.shapes or run.device.type)
    if options.precompile and len(cases) > 1:
        precompile.side_by_side(options.words, cases, options.limit / 3)
    chosen = [tasks.TASKS[name] for name in options.tasks]
    count = len(cases) * len(options.data) * sum(len(run.contenders_for(task)) for task in chosen)
    with tqdm(total=count, unit="row", disable=None) as bar:
        for case in cases:
            torch._dynamo.reset()
            programs: dict[tuple[str, str], tasks.Program] = {}
            for kind in options.data:
                batch = data.ALL_SETS[kind](case, run.device)
                truths: dict[bool, errors.Truth | None] = {False: None, True: None}
                for task in chosen:
                    if truths[task.per_token] is None and not (options.once or options.no_errors or run.late()):
                        truths[task.per_token] = errors.truth_of(task, batch)
                    rows = group(run, case, kind, task, batch, truths[task.per_token], programs, bar)
                    run.rows = report.merged(run.rows + rows)
                    if not options.once:
                        tqdm.write(f"\n{case.text}  {task.name} ({task.about})  {kind} data\n{report.table(rows)}")
                    report.save(Path(options.out), run.runs, run.rows)
    return run.rows


if __name__ == "__main__":
    main()
