"""``python -m tests.fuzz.operators_run``: every operator of torch's database in every place, differences printed.

In several processes, each program with a time limit and on record: ``python -m tests.in_parts``.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice

from tests.fuzz.operators import PLACES, Case, cases, ops, samples
from tests.fuzz.operators_compared import compare
from tests.run_record import RunRecord


def every(only: str, most: int, places: Sequence[str]) -> Iterator[Case]:
    for op in ops():
        if only and only != op.name:
            continue
        for number, sample in samples(op, most):
            for case in cases(op, number, sample, places):
                yield from (case, replace(case, name=f"{case.name}/dynamic", dynamic=True))


def quiet() -> None:
    """Programs that Dynamo or fake tensors refuse are drawn by intent, and refused with a page of log each."""
    for name in ("fusedhead", "torch._subclasses.fake_tensor", "torch._dynamo", "torch.fx"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.operators_run", description=__doc__)
    parser.add_argument("--samples", type=int, default=3, help="of each op")
    parser.add_argument("--only", default="", help="one op, by its name")
    parser.add_argument("--places", default=",".join(PLACES))
    parser.add_argument("--part", default="0/1", help="i/n: every n-th program from the i-th on")
    parser.add_argument("--record", default="", help="a file: a line of JSON for each program, those in it are skipped")
    parser.add_argument("--limit", type=float, default=60, help="seconds that a program on record may take")
    arguments = parser.parse_args()
    quiet()
    seen: Counter[str] = Counter()
    heads: Counter[str] = Counter()
    first, count = map(int, arguments.part.split("/"))
    programs = every(arguments.only, arguments.samples, arguments.places.split(","))
    record = RunRecord(arguments.record, arguments.limit)
    started = time.monotonic()
    stopped: list[bool] = []  # by a signal: end after the program at hand, and say what was seen
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
    for case in islice(programs, first, None, count):
        if stopped:
            break
        if case.name in record.seen:
            continue
        record.begin(case.name)
        try:
            verdict = compare(case)
        except Exception:
            seen["the comparison raised"] += 1
            record.end(case.name, "the comparison raised", detail=traceback.format_exc())
            print(case.name, traceback.format_exc(), flush=True)
            continue
        kind = verdict.kind or "alike"
        fused = sum(head.fused for head in verdict.report.heads)
        seen[kind] += 1
        heads.update(fused=fused, left=len(verdict.report.heads) - fused)
        detail = {} if kind == "alike" else {"detail": verdict.detail}
        record.end(case.name, kind, fused=fused, left=len(verdict.report.heads) - fused, **detail)
        if kind not in ("alike", "skipped"):
            print(f"{case.name}: {verdict.kind}: {verdict.detail}", flush=True)
    print(f"{seen.total()} programs: {dict(seen)}; heads: {dict(heads)}; {time.monotonic() - started:.0f} s")
    print("stopped" if stopped else "to its end")
    return bool(seen.total() - seen["alike"] - seen["skipped"])


if __name__ == "__main__":
    sys.exit(main())
