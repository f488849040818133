"""Two copies of one program, one of whose models returns deferred logits: each step is done to both and compared.

A `World` holds a pool of pairs of tensors, the real one and the deferred one. An action is a function of one side and
of tensors of that side; the tables of `steps`, `modes` and `changes` say what it is tried on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from tests.deferred.heads import D, V, is_deferred
from tests.deferred.machine.changes import CHANGES, OPTIMIZERS
from tests.deferred.machine.comparison import Comparison, tensors_of, written_since
from tests.deferred.machine.models import B, Pair, Side, T, compiled
from tests.deferred.machine.modes import COMPILES, MODES, UNCOMPILED
from tests.deferred.machine.steps import MEETINGS, STATISTICS, STEPS

POOL = 10


class World(Comparison):
    """Both programs, side by side."""

    def __init__(self, form: str) -> None:
        super().__init__()
        real, other, start, run = compiled(form)
        for model in (real, other):
            model.requires_grad_(True)
            model.zero_grad()
            with torch.no_grad():
                for name, value in model.state_dict().items():
                    value.copy_(start[name])
        generator = torch.Generator().manual_seed(0)
        x, y = (torch.randint(0, V, (B, T), generator=generator) for _ in range(2))
        self.sides = (Side(real, real, x.clone(), y.clone()), Side(other, run, x.clone(), y.clone()))
        for side in self.sides:
            side.optimizers = {name: make(side.model.parameters()) for name, make in OPTIMIZERS.items()}

    def forward(self, mode: str) -> None:
        mode = "" if mode in UNCOMPILED else mode
        self.say(f"forward in {mode!r}")
        before = list(self.pairs)
        self.both(lambda s: s.forward(s.tokens), [], mode, runs_forward=True)
        new = [pair for pair in self.pairs if pair not in before]
        if not new:
            return
        model = self.sides[0].model
        hidden = [pair.real for pair in new if pair.real.shape[-1] == D]
        made_of = [model.lm_head.weight, *([model.lm_head.bias] if model.lm_head.bias is not None else []), *hidden]
        self.forwards.append([(t, 0 if t.is_inference() else t._version, t.detach().clone()) for t in made_of])
        for pair in new:
            pair.made_of |= {len(self.forwards) - 1}

    def act(self, kind: str, name: str, picks: Sequence[int], mode: str) -> None:
        table: dict[str, Callable[..., Any]] = {"step": STEPS, "statistic": STATISTICS, "meeting": MEETINGS}[kind]
        wide = [pair for pair in self.pairs if pair.real.ndim and pair.real.shape[-1] == V]
        if not wide:
            return
        chosen = [wide[pick % len(wide)] for pick in picks[: 2 if kind == "meeting" else 1]]
        if kind == "meeting" and chosen[0].real.shape != chosen[1].real.shape:
            return
        mode = "" if mode in UNCOMPILED and name in COMPILES else mode
        self.say(f"{name} of {[self.pairs.index(pair) for pair in chosen]} in {mode!r}")
        self.both(table[name], chosen, mode)

    def change(self, name: str) -> None:
        self.say(name)
        self.coarse_gradients &= name != "gradients cleared"
        self.coarse_weights |= self.coarse_gradients and name.endswith(" steps")
        if name == "weight written through .data":  # no version says so: eager code's gradients mix both weights
            self.unseen |= set(range(len(self.forwards)))
        if name == "weight replaced":  # what was made of the old memory stays as it is; versions are counted on
            weight = self.sides[0].model.lm_head.weight
            self.forwards = [
                [(t, -1 if written_since(*operand) else version, None) if t is weight else operand
                 for operand in each for t, version, _ in [operand]] for each in self.forwards
            ]  # fmt: skip
        if name == "fused AdamW steps" and self.sides[0].model.lm_head.weight.grad is not None:
            weight = self.sides[0].model.lm_head.weight  # in its new memory: no version says so, and steps are counted
            self.forwards = [
                [(t, -1 if t is weight and value is None else version, value) for t, version, value in each]
                for each in self.forwards
            ]
        for side in self.sides:
            CHANGES[name](side)

    def write_to(self, pick: int) -> None:
        """A write to a small result, or to hidden states."""
        small = [pair for pair in self.pairs if not (pair.real.ndim and pair.real.shape[-1] == V)]
        if small:
            pair = small[pick % len(small)]
            self.say(f"write to {self.pairs.index(pair)}")
            self.both(lambda s, t: t.mul_(2), [pair], "")

    def backward(self, pick: int) -> None:
        able = [pair for pair in self.pairs if pair.real.requires_grad and not pair.made_of & self.unseen]
        if not able:
            return
        pair = able[pick % len(able)]
        self.say(f"backward of {self.pairs.index(pair)}")
        both = (pair.real, pair.other)
        outcomes = [self.outcome(lambda t=t: t.float().mean().backward(retain_graph=True)) for t in both]
        if self.errors(outcomes, [pair], backward=True):
            self.forget([pair])
            for side in self.sides:  # part of it may have arrived
                side.model.zero_grad()
            return
        self.coarse_gradients |= pair.coarse
        self.gradients(pair.coarse)

    def both(self, action: Callable[..., Any], chosen: Sequence[Pair], mode: str, runs_forward: bool = False) -> None:
        outcomes = []
        for side, tensors in zip(self.sides, ([p.real for p in chosen], [p.other for p in chosen])):
            run = (lambda _, side=side: action(side)) if runs_forward else (lambda *t, side=side: action(side, *t))
            inputs = [side.tokens] if runs_forward else tensors
            outcomes.append(self.outcome(lambda run=run, inputs=inputs: MODES[mode](run, *inputs)))
        if self.errors(outcomes, chosen):
            self.forget(chosen)
            return
        expected, actual = (value for _, value in outcomes)
        coarse = mode == "autocast" or self.coarse_weights or any(pair.coarse for pair in chosen)
        reals, deferred = tensors_of(expected), tensors_of(actual)
        self.check(len(reals) == len(deferred), f"{len(deferred)} results for {len(reals)}")
        if not reals:
            return self.same_numbers(actual, expected, coarse)
        made_of = frozenset().union(*(pair.made_of for pair in chosen)) if chosen else frozenset()
        for real, other in zip(reals, deferred):
            before = next((pair for pair in self.pairs if pair.real is real), None)
            if before is not None:
                self.check(before.other is other, "eager code hands the same tensor back, this another")
            pair = before or Pair(real, other, made_of, coarse or real.dtype in (torch.bfloat16, torch.float16))
            pair.coarse |= coarse
            self.looks(pair)
            if before is None:
                self.pairs.append(pair)
                self.deferred += is_deferred(other)
            if not is_deferred(other):
                self.same_numbers(other, real, pair.coarse)
        del self.pairs[: max(0, len(self.pairs) - POOL)]


@contextmanager
def room_for_variants() -> Iterator[None]:
    """Dynamo compiles a graph anew for each grad mode, dtype and set of frozen parameters."""
    donation = torch._functorch.config.patch(donated_buffer=False)  # else torch refuses a second backward
    with donation, torch._dynamo.config.patch(recompile_limit=500, accumulated_recompile_limit=5000):
        yield
