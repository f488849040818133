"""``python -m tests.mutations``: every op of torch that writes, in every spelling, against eager code.

For each op and spelling a program is drawn (which argument it writes to, whose memory that is, and whether the head is
trained) and judged; ``--rounds`` draws again, ``--every`` takes all of them.
"""

from __future__ import annotations

import argparse
import logging
import random
import signal
import sys

from torch.testing._internal.common_methods_invocations import op_db

from tests.mutations.calls import ops_that_write, record
from tests.mutations.every_op import Tally, check

STOPPED: list[bool] = []


def stop(*_: object) -> None:
    """End after the op at hand, and still say what was seen."""
    STOPPED.append(True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--every", action="store_true", help="every argument, operand and mode (slow)")
    parser.add_argument("--skip", type=int, default=0, help="so many ops of each round, to go on with a run")
    parser.add_argument("--only", default="", help="ops whose full name begins so")
    arguments = parser.parse_args()
    for name in ("fusedhead", "torch._subclasses.fake_tensor"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    signal.signal(signal.SIGTERM, stop)
    ops = [(name, op) for name, op in ops_that_write().items() if name.startswith(arguments.only)]
    samples, tally, rng = record(op_db, made_up=True), Tally(), random.Random(arguments.seed)
    for round_ in range(arguments.rounds):
        rng.shuffle(ops)
        for i, (name, op) in enumerate(ops):
            if STOPPED:
                break
            if i < arguments.skip:
                continue
            before = len(tally.differences)
            check(name, op, samples, tally, arguments.every, rng)
            for difference in tally.differences[before:]:
                print(difference, flush=True)
            if i % 100 == 99:
                print(f"round {round_}: {i + 1} of {len(ops)} ops, {tally.programs} programs", flush=True)
    print(tally)
    return bool(tally.differences)


if __name__ == "__main__":
    sys.exit(main())
