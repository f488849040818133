"""Random programs over deferred logits, step by step beside eager code, written and made small by hypothesis.

    python -m tests.deferred.state_machine --minutes 60 --seed 1

In several processes, each on record and a fresh one after a failure: ``python -m tests.in_parts``.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
import time
import traceback
import warnings
from collections import Counter

os.environ.setdefault("FUSEDHEAD_MIN_LOGITS", "0")

import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from tests.deferred.machine.changes import CHANGES
from tests.deferred.machine.comparison import Difference, watchers
from tests.deferred.machine.models import FORMS, compiled
from tests.deferred.machine.modes import MODES
from tests.deferred.machine.steps import MEETINGS, STATISTICS, STEPS, loss_compiled_by, step_with_a_break
from tests.deferred.machine.world import World, room_for_variants
from tests.run_record import RunRecord

PICK = st.integers(0, 9)
# half of what is done is done in no particular mode
MODE = st.one_of(st.just(""), st.sampled_from(sorted(MODES)))
SEEDS = 100_000  # of one part, more than any run takes
AGAIN = 3  # exit status: a failure may have left anything behind, the rest belongs in a fresh process
counts: Counter[str] = Counter()
record = RunRecord("", 0)


class DeferredLogitsMachine(RuleBasedStateMachine):
    """A program and its twin. Each rule is a step of both."""

    @initialize(form=st.sampled_from(FORMS), mode=MODE)
    def begin(self, form: str, mode: str) -> None:
        record.watch()
        self.error_around = sys.exc_info()[1]
        self.world = World(form)
        self.world.forward(mode)

    @rule(mode=MODE)
    def forward(self, mode: str) -> None:
        self.world.forward(mode)

    @rule(name=st.sampled_from(sorted(STEPS)), pick=PICK, mode=MODE)
    def step(self, name: str, pick: int, mode: str) -> None:
        self.world.act("step", name, [pick], mode)

    @rule(name=st.sampled_from(sorted(STATISTICS)), pick=PICK, mode=MODE)
    def statistic(self, name: str, pick: int, mode: str) -> None:
        self.world.act("statistic", name, [pick], mode)

    @rule(name=st.sampled_from(sorted(MEETINGS)), picks=st.tuples(PICK, PICK), mode=MODE)
    def meeting(self, name: str, picks: tuple[int, int], mode: str) -> None:
        self.world.act("meeting", name, picks, mode)

    @rule(name=st.sampled_from(sorted(CHANGES)))
    def change(self, name: str) -> None:
        self.world.change(name)

    @rule(pick=PICK)
    def write(self, pick: int) -> None:
        self.world.write_to(pick)

    @rule(pick=PICK)
    def backward(self, pick: int) -> None:
        self.world.backward(pick)

    def teardown(self) -> None:
        if hasattr(self, "world"):
            counts["programs"] += 1
            counts["steps"] += len(self.world.steps)
            if sys.exc_info()[1] is not self.error_around:
                return  # a step has failed: what differs at the end would take that error's place
            self.world.end()
            for name in ("deferred", "waiting", "stale"):
                counts[name] += getattr(self.world, name)


def run(examples: int, steps: int, seed: int) -> None:
    """Raise Difference, with the smallest program found, where a program differs."""
    how = settings(
        max_examples=examples, stateful_step_count=steps, deadline=None, database=None, print_blob=False,
        phases=(Phase.generate, Phase.shrink), suppress_health_check=list(HealthCheck), report_multiple_bugs=False,
    )  # fmt: skip
    with warnings.catch_warnings(), room_for_variants():
        warnings.simplefilter("ignore")  # eager code warns as well, of what random programs do
        run_state_machine_as_test(seeded(seed)(DeferredLogitsMachine), settings=how)


def forget_all() -> None:
    """Nothing compiled, no model, no mode of a program that failed."""
    torch.compiler.reset()
    for each in (compiled, loss_compiled_by, step_with_a_break):
        each.cache_clear()
    while torch._C._len_torch_dispatch_stack():
        torch._C._pop_torch_dispatch_stack()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, help="1, or on record until a signal")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=12, help="most steps of a program")
    parser.add_argument("--stop", action="store_true", help="at the first difference")
    parser.add_argument("--part", default="0/1", help="i/n: every n-th seed from the i-th on")
    parser.add_argument("--record", default="", help="a file: a line of JSON for each seed, those in it are skipped")
    parser.add_argument("--limit", type=float, default=60, help="seconds that a program on record may take")
    arguments = parser.parse_args()
    global record
    record = RunRecord(arguments.record, arguments.limit)
    watchers.append(record.note)
    stopped: list[bool] = []  # by a signal: end after the seed at hand
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
    torch.set_num_threads(1)
    minutes = arguments.minutes or (math.inf if arguments.record else 1.0)
    until, result, done = time.monotonic() + 60 * minutes, 0, 0
    first, step = map(int, arguments.part.split("/"))
    for seed in range(arguments.seed + first, arguments.seed + first + SEEDS * step, step):
        if stopped or time.monotonic() > until:
            break
        if f"seed {seed}" in record.seen:
            continue
        before = counts.copy()
        record.begin(f"seed {seed}")
        failures = []
        try:
            run(50, arguments.steps, seed)
        except Exception as error:
            for each in getattr(error, "exceptions", [error]):
                failures.append(f"{type(each).__name__}: {each}")
                if not isinstance(each, Difference):
                    failures[-1] += "\n" + "".join(traceback.format_exception(each))
                print(f"--- seed {seed}: {failures[-1]}", flush=True)
        result += bool(failures)
        more = {name: counts[name] - before[name] for name in counts}
        detail = {"detail": "\n".join(failures)} if failures else {}
        record.end(f"seed {seed}", "differs" if failures else "alike", **more, **detail)
        print(f"seed {seed}: {dict(counts)}, differences {result}", flush=True)
        if failures and arguments.record:
            return AGAIN
        done += 1
        if failures and arguments.stop:
            break
        if failures or done % 40 == 0:
            forget_all()
    print("stopped" if stopped else "to its end")
    return bool(result)


if __name__ == "__main__":
    sys.exit(main())
