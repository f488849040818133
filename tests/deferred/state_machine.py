"""Random programs over deferred logits, step by step beside eager code, written and made small by hypothesis.

python -m tests.deferred.state_machine --minutes 60 --seed 1
"""

from __future__ import annotations

import argparse
import os
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

from tests.deferred.machine import (
    CHANGES,
    FORMS,
    MEETINGS,
    MODES,
    STATISTICS,
    STEPS,
    Difference,
    World,
    room_for_variants,
)

PICK = st.integers(0, 9)
# half of what is done is done in no particular mode
MODE = st.one_of(st.just(""), st.sampled_from(sorted(MODES)))
counts: Counter[str] = Counter()


class DeferredLogitsMachine(RuleBasedStateMachine):
    """A program and its twin. Each rule is a step of both."""

    @initialize(form=st.sampled_from(FORMS), mode=MODE)
    def begin(self, form: str, mode: str) -> None:
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=12, help="most steps of a program")
    parser.add_argument("--stop", action="store_true", help="at the first difference")
    given = parser.parse_args()
    torch.set_num_threads(1)
    until, seed, found = time.monotonic() + 60 * given.minutes, given.seed, 0
    while time.monotonic() < until:
        try:
            run(50, given.steps, seed)
        except Exception as error:
            found += 1
            for each in getattr(error, "exceptions", [error]):
                print(f"--- seed {seed}: {type(each).__name__}: {each}", flush=True)
                if not isinstance(each, Difference):
                    traceback.print_exception(each)
            if given.stop:
                return 1
        seed += 1
        print(f"seed {seed - 1}: {dict(counts)}, differences {found}", flush=True)
        torch._dynamo.reset() if seed % 40 == 0 else None
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
