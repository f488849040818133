"""A sample of the programs that ``python -m tests.deferred.state_machine`` writes, and what they have found."""

from __future__ import annotations

import os

import pytest

from tests.deferred.machine import MODES, STEPS, World, room_for_variants
from tests.deferred.state_machine import run

PROGRAMS = int(os.environ.get("FUSEDHEAD_MACHINE_PROGRAMS", "24"))
pytestmark = pytest.mark.filterwarnings("ignore")  # eager code warns as well, of what random programs do


def test_random_programs_do_to_deferred_logits_what_they_do_to_real_ones() -> None:
    run(PROGRAMS, 10, seed=0)


def test_a_world_has_deferred_logits() -> None:
    world = World("plain")
    world.forward("")
    world.act("step", "flattened", [0], "")
    assert world.deferred == 2


@pytest.mark.parametrize(
    "program",
    [
        ["contiguous"],
        ["a copy written in reentrant checkpoint"],
        ["a leaf of it in reentrant checkpoint", "backward"],
        ["vmap over it", "the numbers", "backward"],
        ["tokens", "a label too large", "compiled loss"],
    ],
    ids=" ".join,
)
def test_found_by_random_programs(program: list[str]) -> None:
    with room_for_variants():
        world = World("plain")
        world.forward("")
        for line in program:
            name, _, mode = line.partition(" in ") if line.rpartition(" in ")[2] in MODES else (line, "", "")
            if name == "backward":
                world.backward(len(world.pairs) - 1)
            else:
                world.act("step" if name in STEPS else "statistic", name, [0], mode)
        world.end()


@pytest.mark.parametrize("frozen", ["head frozen", "trunk frozen"])
def test_what_is_frozen_after_it_was_compiled_leaves_the_rest_its_gradient(frozen: str) -> None:
    """A Dynamo that does not guard on it runs the graph that it has."""
    with room_for_variants():
        world = World("plain")
        for change in ("all unfrozen", frozen, "all unfrozen"):
            world.change(change)
            world.forward("")
            world.backward(len(world.pairs) - 1)
        world.end()
