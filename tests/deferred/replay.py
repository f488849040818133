"""A program of the state machine once more, from the lines it prints.

    python -m tests.deferred.replay < program.txt

The lines after "--- seed": the form, then a step each.
"""

from __future__ import annotations

import ast
import os
import re
import sys
import warnings
from collections.abc import Iterable

os.environ.setdefault("FUSEDHEAD_MIN_LOGITS", "0")

from tests.deferred.heads import V
from tests.deferred.machine.changes import CHANGES
from tests.deferred.machine.steps import MEETINGS, STATISTICS, STEPS
from tests.deferred.machine.world import World, room_for_variants

ACT = re.compile(r"(?P<name>.+) of (?P<at>\[[\d, ]+\]) in (?P<mode>'.*')")
TABLES = {"step": STEPS, "statistic": STATISTICS, "meeting": MEETINGS}


def play(world: World, line: str) -> None:
    """One step, as `World.say` has it."""
    match = ACT.fullmatch(line)
    if match:
        wide = [pair for pair in world.pairs if pair.real.ndim and pair.real.shape[-1] == V]
        picks = [wide.index(world.pairs[at]) for at in ast.literal_eval(match["at"])]
        kind = next(kind for kind, table in TABLES.items() if match["name"] in table)
        return world.act(kind, match["name"], picks, ast.literal_eval(match["mode"]))
    if line.startswith("forward in "):
        return world.forward(ast.literal_eval(line.removeprefix("forward in ")))
    if line in CHANGES:
        return world.change(line)
    which = world.pairs[int(line.rsplit(" ", 1)[1])]
    if line.startswith("backward of "):
        return world.backward([pair for pair in world.pairs if pair.real.requires_grad].index(which))
    assert line.startswith("write to "), line
    return world.write_to([p for p in world.pairs if not (p.real.ndim and p.real.shape[-1] == V)].index(which))


def replay(lines: Iterable[str]) -> None:
    """Raise Difference where the program differs from eager code."""
    form, *steps = [line.strip() for line in lines if line.strip()]
    with warnings.catch_warnings(), room_for_variants():
        warnings.simplefilter("ignore")  # eager code warns as well, of what random programs do
        world = World(ast.literal_eval(form.removeprefix("form ")))
        for step in steps:
            play(world, step)
        world.end()


if __name__ == "__main__":
    replay(sys.stdin)
