"""``python -m tests.fuzz --seconds S --seed K``: random programs against eager code, differences printed as tests."""

from __future__ import annotations

import argparse
import logging
import re
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass, field

from tests.fuzz.compare import Verdict, compare
from tests.fuzz.grammar import draw
from tests.fuzz.minimise import minimise
from tests.fuzz.program import as_test

STOPPED: list[bool] = []


@dataclass
class Tally:
    """What a run has seen."""

    programs: int = 0
    with_a_head: int = 0
    fused: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    engines: Counter[str] = field(default_factory=Counter)
    differences: list[str] = field(default_factory=list)

    def add(self, verdict: Verdict) -> None:
        self.programs += 1
        self.with_a_head += bool(verdict.report.heads)
        for head in verdict.report.heads:
            self.fused += head.fused
            if head.fused:
                self.engines[re.sub(r";[^;]*?GFLOP|\(.*?\)", "", head.engine)] += 1
            else:
                self.refused[re.sub(r"\(at .*|\d+", "", head.reason)[:90]] += 1

    def __str__(self) -> str:
        lines = [
            f"{self.programs} programs, {self.with_a_head} with a head, {self.fused} heads fused, "
            f"{len(self.differences)} differences"
        ]
        lines += [f"  {count:5d} fused: {engine}" for engine, count in self.engines.most_common()]
        lines += [f"  {count:5d} left: {reason}" for reason, count in self.refused.most_common()]
        return "\n".join(lines)


def fuzz(seconds: float, seed: int, stack: str = "eager", *, keep_going: bool = True, shrink: float = 60.0) -> Tally:
    """Programs ``seed:0``, ``seed:1`` ... for so many seconds."""
    for name in ("fusedhead", "torch._subclasses.fake_tensor", "torch._dynamo", "torch.fx"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    tally, deadline = Tally(), time.monotonic() + seconds
    while time.monotonic() < deadline and not STOPPED:
        name = f"{seed}:{tally.programs}"
        case = draw(name)
        verdict = compare(case, stack)
        tally.add(verdict)
        if verdict.kind:
            kind = verdict.kind
            small = minimise(case, lambda c: compare(c, stack).kind == kind, shrink)  # noqa: B023
            shown = f"# seed {name}: {verdict.kind}\n# {compare(small, stack).detail}\n{as_test(small)}"
            tally.differences.append(shown)
            print(shown, flush=True)
            if not keep_going:
                break
    return tally


def stop(*_: object) -> None:
    """End after the program at hand, and still say what was seen."""
    STOPPED.append(True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--aot", action="store_true", help="hand the rewritten graphs to AOTAutograd")
    parser.add_argument("--inductor", action="store_true", help="hand the rewritten graphs to Inductor (slow)")
    parser.add_argument("--show", metavar="SEED:N", help="print that program and its verdict, and stop")
    arguments = parser.parse_args()
    stack = "inductor" if arguments.inductor else "aot" if arguments.aot else "eager"
    if arguments.show:
        case = draw(arguments.show)
        verdict = compare(case, stack)
        print(as_test(case), verdict.report, verdict.kind, verdict.detail, sep="\n")
        return bool(verdict.kind)
    signal.signal(signal.SIGTERM, stop)
    tally = fuzz(arguments.seconds, arguments.seed, stack)
    print(tally)
    return bool(tally.differences)


if __name__ == "__main__":
    sys.exit(main())
