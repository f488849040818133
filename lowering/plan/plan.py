"""Which engine computes a head, by which algorithm, in which windows: a pure function of sizes and a budget.

| algorithm    | products | workspace                              | when                                    |
|--------------|----------|----------------------------------------|-----------------------------------------|
| statistics   | 1        | one block                              | nothing to differentiate now            |
| single pass  | 3        | one window of exponentials, tokens x V | the loss is linear in the statistics    |
| frozen       | 2        | one block (Triton: one window)         | the same, and w wants no gradient       |
| recompute    | 4 (or 3) | one block                              | any upstream; too small a budget        |
| float8       | 3        | two of exponentials in float8          | the same for `plan.float8`, where asked |
| whole        | 3 (or 1) | all logits                             | fewer logits than `whole_below`         |

A product is 2 N V D FLOP; recompute is 3 products where the lse is known from the forward. On the CPU a block is cut to
the caches by the engine; a large float32 head with one plain softmax takes windows of the C++ kernel there, in each of
the first four algorithms (`Windows.threads`). `plan.torch` and `plan.triton` hold each engine's candidates.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from fusedhead.kernels.contract import Windows
from fusedhead.kernels.torch_engine.cpp_library import threads_of_kernel
from fusedhead.lowering.engines import Engine, engine_for
from fusedhead.lowering.plan.problem import AUTO, LEAST_MEMORY, MIB, Problem
from fusedhead.lowering.plan.triton import classes_beside


class Plan(NamedTuple):
    engine: Engine
    algorithm: str
    windows: Windows
    predicted_bytes: int  # workspace at the peak, without operands and results
    predicted_flop: int
    reason: str  # one sentence


def plan(problem: Problem, *, memory: int = AUTO, free_bytes: int | None = None, whole_below: int = 0) -> Plan:
    """The plan of one head: engine, algorithm, windows and cost.

    ``memory`` is 0 for auto, -1 for the least, else MiB; ``free_bytes`` bounds auto from above where the device is
    nearly full. Fewer logits than ``whole_below`` may be built whole, whatever the budget: Inductor would have built
    them (`legality.profitability`).
    """
    flop = 2 * problem.tokens * problem.vocab * problem.hidden
    threads = threads_of_kernel(problem.dtype, problem.device_type, flop)
    if threads != problem.threads:
        problem = problem._replace(threads=threads)
    return _planned(problem, memory, free_bytes, whole_below)


@lru_cache(maxsize=1024)  # a step asks for every head it computes
def _planned(problem: Problem, memory: int, free_bytes: int | None, whole_below: int) -> Plan:
    engine, logits = engine_for(problem.dtype, problem.device_type), problem.tokens * problem.vocab
    if engine.for_few_logits is not None and logits < whole_below:
        engine = engine.for_few_logits
    budget = memory * MIB if memory > 0 else None
    if memory == AUTO and free_bytes is not None:
        budget = free_bytes // 2
    candidates, limit = engine.candidates(problem, memory, budget)
    fitting = [each for each in candidates if limit is None or each.workspace_bytes <= limit]
    name, windows, held = fitting[0] if fitting else min(candidates, key=lambda each: each.workspace_bytes)
    flop = _products(name, problem) * 2 * logits * problem.hidden
    if engine.name.startswith("triton"):
        flop += 2 * problem.tokens * problem.hidden * classes_beside(problem, name)
    return Plan(engine, name, windows, held, flop, _reason(name, held, limit, memory, bool(fitting)))


def _products(algorithm: str, problem: Problem) -> int:
    """The number of products of 2 N V D FLOP that an algorithm takes."""
    needs = problem.needs
    gradients = needs.h + (needs.w or needs.cols)
    forward_too = problem.linear and any(needs)
    counts = {"statistics": 1, "frozen": 2, "single pass": 1 + gradients, "whole": 1 + gradients, "float8": 3}
    return counts.get(algorithm, forward_too + 1 + gradients)


WHY = {
    "statistics": "one sweep, no gradient is asked for here",
    "frozen": "w wants no gradient, so no logits are kept",
    "single pass": "gradients come out of the forward sweep",
    "float8": "gradients come out of the forward sweep, their products in float8",
    "recompute": "logits are rebuilt for the gradients",
    "whole": "its logits are few, and built whole",
}


def _reason(name: str, held: int, limit: int | None, memory: int, fits: bool) -> str:
    if name == "whole":
        return WHY[name]
    if not fits and limit is not None:
        return f"no plan fits in {limit / MIB:.0f} MiB; this one holds the least, {held / MIB:.1f} MiB"
    asked = "the least memory" if memory == LEAST_MEMORY else "no limit" if limit is None else f"{limit / MIB:.0f} MiB"
    return f"{WHY[name]}; {held / MIB:.1f} MiB of workspace, asked for {asked}"
