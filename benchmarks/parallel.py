"""A head whose classes lie in shards: ``python -m benchmarks.parallel``, on one GPU or under torchrun.

    python -m benchmarks.parallel                                   one GPU: heads in 1, 2, 4, 8 shards, without a wire
    torchrun --nproc-per-node 2 -m benchmarks.parallel              the same with NCCL, as many shards as processes

On one GPU a process is rank 0 of so many and its collectives are copies of the same size: one shard's time against a
head with as many classes and no shards. Under torchrun collectives are real, a time is that of the slowest rank, and
each shard is timed three ways: as it is, without its wire, and its collectives alone; what the last two take more than
the first is hidden. Beside it stand Inductor under ``loss_parallel()``, and the figure of `benchmarks.cost_model` for
the latency and bandwidth that all-reduces of five sizes show first. Times are medians of shuffled rounds by device
events. ``--smoke`` is a size for a CPU. Writes parallel.json and parallel.md into --out.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import arrangements, cost_model, data, errors, machine, measure, ranks, shapes, tasks
from benchmarks.head import reason
from benchmarks.parallel_heads import CONTENDERS, ONE, Contender, Shard, shard_of
from benchmarks.parallel_report import Row, markdown, table
from fusedhead.functional.vocab_parallel import bounds

SMOKE = "64x32x512:float32"
TRAIN = tasks.TASKS["train"]
UNSENT, ALONE = "|without the wire", "|its collectives"  # behind a contender's name


class Run:
    """The options of one run, its clock, and what it has found."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.launched = options, ranks.launched()
        self.device = ranks.device_of_this_rank(options.device)
        self.deadline = time.monotonic() + options.limit
        self.network = cost_model.given_network(options)
        self.rows: list[Row] = []
        origin = machine.origin(self.device, "benchmarks.parallel", options.words)
        if self.launched:
            count = os.environ.get("WORLD_SIZE", "2")
            origin["command"] = str(origin["command"]).replace("python", f"torchrun --nproc-per-node {count}", 1)
        self.about: dict[str, Any] = {"runs": [origin]}

    def agree(self, number: float) -> float:
        return ranks.greatest(number, self.device) if self.launched else number

    def late(self) -> bool:
        return self.agree(time.monotonic() - self.deadline) > 0

    def chosen(self) -> dict[str, Contender]:
        contenders = {name: CONTENDERS[name] for name in self.options.contenders or CONTENDERS}
        smoke = self.options.smoke and not self.options.contenders
        runnable = {name: c for name, c in contenders.items() if self.launched or c.unsent}
        return {name: c for name, c in runnable.items() if not (smoke and c.compiled)}

    def say(self, text: str) -> None:
        if not self.launched or dist.get_rank() == 0:
            print(text, file=sys.stderr, flush=True)

    def save(self) -> None:
        if self.launched and dist.get_rank():
            return
        folder = Path(self.options.out)
        folder.mkdir(parents=True, exist_ok=True)
        results = {**self.about, "rows": [dataclasses.asdict(row) for row in self.rows]}
        (folder / "parallel.json").write_text(json.dumps(results, indent=1) + "\n")
        (folder / "parallel.md").write_text(markdown(results, self.rows))


def truth_of(run: Run, batch: data.Batch) -> errors.Truth | None:
    return errors.truth_of(TRAIN, batch) if run.launched and not run.options.no_errors else None


def errors_of(run: Run, s: Shard, truth: errors.Truth, results: tuple[torch.Tensor, ...]) -> dict[str, float]:
    """Relative errors against float64 of loss, dH and this rank's dW, the greatest of the ranks."""
    first, last = bounds(s.case.vocab, s.ranks, s.rank)
    dh = truth.dh if len(results[1]) == len(truth.dh) else truth.dh.chunk(s.ranks)[s.rank]
    mine = truth._replace(dh=dh, dw=truth.dw[first:last])
    return {name: run.agree(error) for name, error in errors.errors_of(TRAIN, results, mine).items()}


def prepared(run: Run, s: Shard, name: str, truth: errors.Truth | None, row: Row) -> dict[str, measure.Step]:
    """A contender's first steps: its errors, memory and collectives in the row, and the steps to time."""
    contender, problem = CONTENDERS[name], ""
    steps: dict[str, measure.Step] = {}
    try:
        step = contender.make(s)
        steps[name] = step if run.launched else ranks.without_wire(step)
        resident = measure.resident_bytes(run.device)
        results = steps[name]()
        if truth is not None and contender.arrangement:
            row.error = errors_of(run, s, truth, results)
        del results
        collectives = ranks.collectives_of(step, run.launched)
        row.collectives = [[one.kind, one.nbytes] for one in collectives]
        row.extra_mib = run.agree(measure.extra_bytes(steps[name], run.device, resident) / 2**20)
        if run.launched and collectives and contender.apart:
            steps[name + UNSENT] = ranks.without_wire(step)
            steps[name + ALONE] = ranks.alone(collectives, s.ranks, run.device)
            steps[name + UNSENT]()
    except Exception as error:  # a contender's failure is a result, of all ranks
        problem = reason(error)
        if run.launched and dist.get_rank():
            print(f"rank {dist.get_rank()}: {name}: {problem}", file=sys.stderr, flush=True)
    if run.agree(float(bool(problem))):
        row.note = problem or "failed on another rank"
        return {}
    return steps


def group(run: Run, case: shapes.Case, batch: data.Batch, truth: errors.Truth | None, count: int) -> list[Row]:
    """All rows of one case and number of ranks, inside a process group."""
    rank = dist.get_rank() if run.launched else 0
    s = shard_of(case, batch, dist.group.WORLD, rank, count)  # type: ignore[arg-type]
    wire = str(dist.get_backend()) if run.launched else ""
    rows, steps = [], {}
    measure.settle(run.device, case.torch_dtype)
    for name in run.chosen():
        row = Row(case.text, count, wire, name)
        rows.append(row)
        if run.late():
            row.note = "not run: the time limit of this run"
            continue
        measure.release(run.device)
        begin = time.monotonic()
        steps.update(prepared(run, s, name, truth, row))
        run.say(f"  {time.monotonic() - begin:6.1f} s  {case.text} x {count}: {name} prepared {row.note}")
    measure.release(run.device)
    options = run.options
    times = measure.interleaved(steps, run.device, options.rounds, options.seconds, run.deadline, agree=run.agree)
    fill(run, case, rows, times)
    return rows


def fill(run: Run, case: shapes.Case, rows: list[Row], times: dict[str, list[float]]) -> None:
    """Times into the rows, what is relative to one GPU's head, and the cost model's figures beside them."""
    one = measure.median_ms(times.get(ONE, []))
    for row in rows:
        measure.put_times(row, times.get(row.contender, []))
        if row.ms:
            row.efficiency = one / row.ms if one else None
        row.unsent_ms = measure.median_ms(times.get(row.contender + UNSENT, []))
        row.alone_ms = measure.median_ms(times.get(row.contender + ALONE, []))
        arrangement = CONTENDERS[row.contender].arrangement
        if arrangement is None:
            continue
        model = arrangements.ARRANGEMENTS[arrangement]
        sent = model.collectives(case, row.ranks)
        row.bytes_a_token = sum(cost_model.sent(each, row.ranks) for each in sent) / case.tokens
        row.model_wire_ms = 1e3 * cost_model.wire(sent, row.ranks, run.network.link(row.ranks)) if row.wire else 0.0
        if run.device.type == "cuda":
            chip = cost_model.given_chip(run.options, case.dtype)
            row.model_ms = row.model_wire_ms + 1e3 * cost_model.compute(case, model, row.ranks, chip)


def measured_link(run: Run) -> None:
    """Time collectives of several sizes, and put the link that they show into the cost model."""
    count = dist.get_world_size()
    if count == 1:
        return
    sizes = ranks.SIZES[:3] if run.device.type == "cpu" else ranks.SIZES
    times = ranks.times_of_collectives(count, run.device, sizes, 1 if run.options.smoke else ranks.ROUNDS)
    link = ranks.link_of(times, count)
    run.network = run.network._replace(inside=link, node=max(count, run.network.node))
    run.about["collectives"] = {
        kind: [
            {
                "bytes": nbytes,
                "us": 1e6 * spent,
                "model_us": 1e6 * cost_model.seconds(arrangements.Collective(kind, nbytes), count, link),
            }
            for nbytes, spent in each
        ]
        for kind, each in times.items()
    }


def arguments(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parallel", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", help=f"NxDxV[:dtype],... (default: {cost_model.SHAPES})")
    parser.add_argument("--ranks", type=lambda s: [int(w) for w in s.split(",")], help="without torchrun: 1,2,4,8")
    parser.add_argument("--contenders", type=lambda s: s.split(";"), help=f"joined by ;: {'; '.join(CONTENDERS)}")
    parser.add_argument("--data", default="random", choices=sorted(data.SETS))
    parser.add_argument("--rounds", type=int, default=9, help="shuffled rounds at most")
    parser.add_argument("--seconds", type=float, default=2.0, help="timing budget of one row")
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds for the whole run")
    parser.add_argument("--no-errors", action="store_true", help="skip the comparison with float64 under torchrun")
    parser.add_argument("--smoke", action="store_true", help=f"{SMOKE}, 1 and 2 ranks, what is compiled left out")
    parser.add_argument("--out", default="benchmarks/results/latest", help="folder of parallel.json, parallel.md")
    cost_model.add_arguments(parser)
    options = parser.parse_args(words)
    options.words = words
    if unknown := [name for name in options.contenders or () if name not in CONTENDERS]:
        parser.error(f"no contender is called {unknown[0]!r}; there are {'; '.join(CONTENDERS)}")
    options.shapes = options.shapes or (SMOKE if options.smoke else cost_model.SHAPES)
    options.ranks = options.ranks or ([1, 2] if options.smoke else [1, 2, 4, 8])
    options.rounds = min(options.rounds, 3) if options.smoke else options.rounds
    return options


def main(words: list[str] | None = None) -> list[Row]:
    run = Run(arguments(sys.argv[1:] if words is None else words))
    in_group = functools.partial(ranks.process_group, run.device)
    if run.launched:
        with in_group():
            measured_link(run)
            for case in shapes.parse(run.options.shapes):
                measure_case(run, case, [dist.get_world_size()], None)
    else:
        for case in shapes.parse(run.options.shapes):
            measure_case(run, case, run.options.ranks, in_group)
    return run.rows


def measure_case(run: Run, case: shapes.Case, counts: list[int], in_group: Any) -> None:
    """One case at each number of ranks; without a group that exists each in one of its own."""
    batch = data.SETS[run.options.data](case, run.device)
    truth = truth_of(run, batch)
    for count in counts:
        torch._dynamo.reset()
        if in_group is None:
            rows = group(run, case, batch, truth, count)
        else:
            with in_group(count):
                rows = group(run, case, batch, truth, count)
        run.rows += rows
        run.about["link"] = {**run.network.inside._asdict(), "ranks": counts[-1] if run.launched else 0}
        run.about["prediction"] = predictions(run)
        run.save()
        if not run.launched or dist.get_rank() == 0:
            print(f"\n{table(rows)}", flush=True)


def predictions(run: Run) -> dict[str, Any]:
    """The model's tables of this run's cases, by case and arrangement."""
    if run.device.type != "cuda" and not run.options.tera:
        return {}
    by_contender: dict[str, Any] = {}
    for case in shapes.parse(run.options.shapes):
        chip = cost_model.given_chip(run.options, case.dtype)
        for name in arrangements.ARRANGEMENTS:
            each = {w: cost_model.predict(case, name, w, chip, run.network) for w in cost_model.RANKS}
            by_contender.setdefault(case.text, {})[name] = {w: one._asdict() for w, one in each.items()}
    return by_contender


if __name__ == "__main__":
    main()
