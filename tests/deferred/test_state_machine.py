"""A sample of the programs that ``python -m tests.deferred.state_machine`` writes, and what they have found."""

from __future__ import annotations

import os

import pytest

from tests.deferred.machine.modes import MODES
from tests.deferred.machine.steps import STEPS
from tests.deferred.machine.world import World, room_for_variants
from tests.deferred.replay import replay
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


FOUND = {
    "a kept statistic is written to": "logsumexp of [0] in ''; write to 1; entropy of [0] in ''",
    "the history is lost below a mode": "gradient of a function of [0] in 'counted'; backward of 0",
    "and in a region": "vmap over it of [0] in 'selective checkpoint'; the numbers of [0] in ''; backward of 2",
    "parts of what is written to": "chunks of [0] in ''; a class written of [0] in ''; backward of 0",
    "a view made in inference mode": "one of [0] in 'inference_mode'; copied into of [0, 0] in ''",
    "... by a call of others": "flattened of [0] in 'inference_mode'; through a graph break of [1] in ''",
    "rows picked in inference mode": "split of [0] in 'inference_mode'; through a graph break of [1] in ''",
    "a read part, compiled": "chunks of [0] in ''; a list of [2] in ''; through a graph break of [2] in ''",
    "... by another": "chunks of [0] in ''; a list of [2] in ''; loss compiled by another of [2] in ''; backward of 3",
    "compiled in a region, then read": "compiled loss of [0] in 'checkpoint'; its gradient of [0] in ''; backward of 1",
    "a graph break in a region": "through a graph break of [0] in 'checkpoint'; KL of [0, 0] in ''; backward of 1",
    "parts that a function returned": "chunks of [0] in 'reentrant checkpoint'; a class written of [0] in ''",
    "strides of what it returned": "tokens of [0] in 'reentrant checkpoint'; a leaf of it of [1] in ''",
    "a function of a written part": "chunks of [0] in ''; a class written of [0] in ''; vmap over it of [1] in ''",
}
COMPILED = ("compiled loss", "loss compiled by another", "through a graph break")


@pytest.mark.parametrize("program", FOUND.values(), ids=list(FOUND))
def test_a_program_that_differed_does_so_no_more(program: str) -> None:
    replay(["form 'plain'", "forward in ''", *program.split(";")])


@pytest.mark.parametrize("step", COMPILED)
def test_logits_made_in_inference_mode_are_compiled_outside_of_it(step: str) -> None:
    replay(["form 'plain'", "forward in 'inference_mode'", f"{step} of [0] in ''"])


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
