"""``python -m benchmarks.pass_use``: how many programs need each pass, each rule, and each answer of deferred logits.

    python -m benchmarks.pass_use sweep --sample 40 --out FOLDER     # classes of transformers (needs transformers)
    python -m benchmarks.pass_use tests tests/deferred/test_lower.py --out FOLDER   # a program a test
    python -m benchmarks.pass_use table FOLDER/*.json                # one table of several runs

A program needs a pass that edited a graph of its, a rule that gave a value or a refusal, and a shared statistic where
one that an earlier sweep had found was taken. Nothing is timed. Programs of the sweep are built and trained a step as
`tests.sweep_transformers` does, on the eager stack.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import os
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("FUSEDHEAD_MIN_LOGITS", "0")

import torch

from fusedhead import pipeline
from fusedhead.deferred import lower_tokenwise, query
from fusedhead.graph.reasons import Escape
from fusedhead.report.report import PassRecord, Report
from fusedhead.rules import RULES
from fusedhead.rules.table import TOKEN_RULES

PASSES = (*pipeline.MODULE_PASSES, *pipeline.BODY_PASSES)

Use = tuple[str, list[tuple[str, str]]]  # a program, and the kinds and names of what it needs

used: set[tuple[str, str]] = set()  # what the program that runs has needed: kind, name
sweeps = 0  # over deferred logits, of all programs


def note(kind: str, name: str) -> None:
    used.add((kind, name))


def rule_name(rule: Callable[..., Any]) -> str:
    return f"{rule.__module__.removeprefix('fusedhead.rules.')}.{rule.__name__}"


def watch(shares: bool) -> None:
    """Note what is needed from now on. Registries are wrapped where they stand.

    Nothing else changes, but that statistics of earlier sweeps are not taken where ``shares`` is false.
    """

    def counted(rule: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(rule)
        def read(*args: Any, **kwargs: Any) -> Any:
            try:
                value = rule(*args, **kwargs)
            except Escape:
                note("rule refuses", rule_name(rule))
                raise
            if value is not None:
                note("rule", rule_name(rule))
            return value

        return read

    for overload, rule in RULES.items():
        RULES[overload] = counted(rule)
    for overload, rules in TOKEN_RULES.items():
        TOKEN_RULES[overload] = tuple(each._replace(read=counted(each.read)) for each in rules)

    attempt, below = pipeline.Attempt.run, lower_tokenwise.run_passes
    lookup, whole, sweep = query.known_statistic, query.sweep_whole, query.Request.sweep

    def edited(record: PassRecord, body: Any) -> None:
        if record.edits:
            note("pass", record.name)

    def attempted(self: pipeline.Attempt, *args: Any) -> None:
        attempt(self, *args)
        if self.speculation_failed:
            note("pass", "a speculative pass is taken back")
        elif not self.grown:
            for record in self.report.passes:
                edited(record, None)

    def shared(*args: Any) -> Any:
        statistic = lookup(*args) if shares else None
        note("deferred", "a statistic is asked for")
        if statistic is not None:
            note("deferred", "a statistic of an earlier sweep is taken")
        return statistic

    def swept(*args: Any) -> Any:
        note("deferred", "one sweep for the pieces of logits")
        return whole(*args)

    def counted_sweep(*args: Any) -> Any:
        global sweeps
        sweeps += 1
        return sweep(*args)

    pipeline.Attempt.run = attempted  # type: ignore[method-assign]
    lower_tokenwise.run_passes = functools.partial(below, ran=edited)
    query.Request.sweep = counted_sweep  # type: ignore[method-assign]
    query.known_statistic, query.sweep_whole = shared, swept


def out_of_time(*_: Any) -> None:
    raise TimeoutError


def sweep(count: int, limit: int, tell: Callable[[Use], None]) -> None:
    """Tell what each of ``count`` classes of transformers needs, evenly spread; a class gets ``limit`` seconds."""
    from tests.sweep_transformers.__main__ import classes, sample
    from tests.sweep_transformers.batches import batch
    from tests.sweep_transformers.verdict import built, compiled, step

    signal.signal(signal.SIGALRM, out_of_time)
    for name in sample(classes(), count):
        used.clear()
        report = Report()
        torch.compiler.reset()
        signal.alarm(limit)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = built(name)
                step(model, compiled(model, "eager", report, [], []), batch(model, name))
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)
        finally:
            signal.alarm(0)
        if report.graphs:
            tell((name, sorted(used)))


class EachTest:
    """A plugin of pytest: ``tell`` is called with what each test needs."""

    def __init__(self, tell: Callable[[Use], None]) -> None:
        self.tell = tell

    def pytest_runtest_setup(self) -> None:
        used.clear()

    def pytest_runtest_teardown(self, item: Any) -> None:
        if used:
            self.tell((item.nodeid, sorted(used)))


def tests(arguments: list[str], tell: Callable[[Use], None]) -> None:
    import pytest

    pytest.main(["-q", "-p", "no:cacheprovider", *arguments], plugins=[EachTest(tell)])


def all_rules() -> list[str]:
    functions = [*RULES.values(), *(each.read for rules in TOKEN_RULES.values() for each in rules)]
    return sorted({rule_name(rule) for rule in functions})


def table(files: Iterable[Path]) -> str:
    """The counts of several runs side by side, a line for each pass and rule, those that none needs too."""
    runs = [json.loads(file.read_text()) for file in files]
    counts = [Counter((kind, name) for _, needs in run["programs"] for kind, name in needs) for run in runs]
    names = {"pass": [each.name for each in PASSES], "rule": all_rules(), "rule refuses": []}
    names["deferred"] = [
        "a statistic is asked for",
        "a statistic of an earlier sweep is taken",
        "one sweep for the pieces of logits",
    ]
    lines = [f"* {chr(65 + i)}: {run['what']}, {len(run['programs'])} programs" for i, run in enumerate(runs)]
    for kind, listed in names.items():
        listed = listed or sorted({name for count in counts for k, name in count if k == kind})
        lines += ["", f"| {kind} | " + " | ".join(chr(65 + i) for i in range(len(runs))) + " |"]
        lines += ["|---" * (len(runs) + 1) + "|"]
        lines += [f"| {name} | " + " | ".join(str(count[kind, name]) for count in counts) + " |" for name in listed]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pass_use", description=__doc__)
    parser.add_argument("what", choices=("sweep", "tests", "table"))
    parser.add_argument("files", nargs="*", help="arguments of pytest, or runs to be put into one table")
    parser.add_argument("--sample", type=int, default=40, metavar="K", help="classes of the sweep, evenly spread")
    parser.add_argument("--limit", type=int, default=180, metavar="S", help="seconds that a class of the sweep gets")
    parser.add_argument("--no-sharing", dest="shares", action="store_false", help="take no earlier statistics")
    parser.add_argument("--name", default="", help="what the table calls the run")
    parser.add_argument("--out", type=Path, help="a JSON file for the run, or a page for the table")
    arguments = parser.parse_args(argv)
    if arguments.what == "table":
        text = table(map(Path, arguments.files))
        arguments.out.write_text(text) if arguments.out else print(text, end="")
        return 0
    if arguments.what == "sweep":
        logging.disable(logging.CRITICAL)
    watch(arguments.shares)
    programs: list[Use] = []

    def tell(use: Use) -> None:
        programs.append(use)
        if arguments.out:
            run = {"what": arguments.name or arguments.what, "sweeps": sweeps, "programs": programs}
            arguments.out.write_text(json.dumps(run) + "\n")

    if arguments.what == "sweep":
        sweep(arguments.sample, arguments.limit, tell)
    else:
        tests(arguments.files, tell)
    return 0


if __name__ == "__main__":
    sys.exit(main())
