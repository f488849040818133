"""One program under eager PyTorch, Inductor and fusedhead, and the rule by which the three must agree.

The rule, for every logged number and for the movement of every weight (its change over the whole training):

    |fusedhead - eager| <= 1.5 * |inductor - eager| + slack

Weights are compared by their norms, and the slack is relative to the norm of the eager movement: a training that
moved the weights by 1 may end `slack` away. Inductor is the measure because compiling alone already reorders sums.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import fusedhead
from benchmarks.measure import cpu_allocations, peak_of
from fusedhead.report import observers
from fusedhead.report.head_record import HeadRecord
from fusedhead.report.report import Report

FACTOR = 1.5
FLOAT32 = 2e-3  # a float32 training of a few steps with Adam, whose step is a ratio of small numbers
NO_GRADIENT = re.compile(r"\b(key|k_proj)\.bias$")  # it adds the same to all scores of a query: only rounding moves it
BFLOAT16 = 5e-2  # under bfloat16 autocast eager rounds the logits to 8 bits of mantissa; the fused head does not


@dataclass
class Trained:
    """What a training leaves behind: numbers that were logged, and the weights before and after."""

    logged: dict[str, float]
    before: dict[str, Tensor]
    after: dict[str, Tensor]
    heads: list[HeadRecord] = field(default_factory=list)
    peak: int = 0  # bytes of torch's CPU allocator, above what was there before the training

    @property
    def fused(self) -> int:
        """Heads fused in some graph, each line of the model counted once."""
        return len({head.where for head in self.heads if head.fused})

    def movement(self, name: str) -> Tensor:
        return self.after[name].double() - self.before[name].double()


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies of what is trained, under the names that the uncompiled model has."""
    return {
        name.replace("_orig_mod.", ""): parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


@contextmanager
def switched_on(logits: str) -> Iterator[list[HeadRecord]]:
    """fusedhead in place of Inductor; yields the records of the heads it meets."""
    heads: list[HeadRecord] = []

    def add(report: Report) -> None:
        assert not report.errors, report.errors
        heads.extend(report.heads)

    fusedhead.enable(logits=logits)
    remove = observers.add(add)
    try:
        yield heads
    finally:
        remove()
        fusedhead.disable()


Program = Callable[[bool], Trained]  # told whether to compile
PEAKS: list[tuple[int, int, int]] = []  # of each program that this test has trained: eager, Inductor, fusedhead


def watched(program: Program, compiled: bool) -> Trained:
    """The training, and the peak of its memory."""
    result, allocated = cpu_allocations(lambda: program(compiled))
    result.peak = peak_of(allocated)
    return result


def three_ways(program: Program, logits: str = "deferred") -> tuple[Trained, Trained, Trained]:
    """The program eager, with Inductor and with fusedhead, from the same random numbers."""
    results = []
    for way in ("eager", "inductor", "fusedhead"):
        torch.compiler.reset()
        torch.manual_seed(0)
        if way == "fusedhead":
            with switched_on(logits) as heads:
                result = watched(program, True)
            result.heads = heads
        else:
            result = watched(program, way == "inductor")
        results.append(result)
    eager, inductor, fused = results
    PEAKS.append((eager.peak, inductor.peak, fused.peak))
    return eager, inductor, fused


def differences(eager: Trained, other: Trained) -> Mapping[str, tuple[float, float]]:
    """(distance to eager, scale) of every logged number and of every weight's movement."""
    assert eager.logged.keys() == other.logged.keys()
    assert eager.after.keys() == other.after.keys()
    results = {f"logged {n}": (abs(other.logged[n] - x), max(abs(x), 1.0)) for n, x in eager.logged.items()}
    for name in eager.after:
        if NO_GRADIENT.search(name):
            continue
        moved = eager.movement(name)
        results[name] = (float((other.movement(name) - moved).norm()), float(moved.norm()))
    return results


def agree(eager: Trained, inductor: Trained, fused: Trained, slack: float = FLOAT32) -> None:
    """Fails with every quantity that breaks the rule."""
    ours, theirs = differences(eager, fused), differences(eager, inductor)
    broken = [
        f"{name}: fusedhead is {far:.3e} from eager, Inductor {theirs[name][0]:.3e}, allowed "
        f"{FACTOR * theirs[name][0] + slack * scale:.3e}"
        for name, (far, scale) in ours.items()
        if not far <= FACTOR * theirs[name][0] + slack * scale  # a NaN breaks it too
    ]
    assert not broken, "\n".join(broken)
    moved = [float(eager.movement(name).norm()) for name in eager.after]
    assert max(moved) > 0, "the training did not move any weight"


def check(program: Program, heads: int, slack: float = FLOAT32, logits: str = "deferred") -> Trained:
    """All of it: train three ways, compare, and count the heads that were fused. Returns fusedhead's training."""
    eager, inductor, fused = three_ways(program, logits)
    agree(eager, inductor, fused, slack)
    assert fused.fused == heads, "\n".join(map(str, fused.heads)) or "no head was met"
    return fused
