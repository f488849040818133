"""Two copies of one program, one of whose models returns deferred logits: each step is done to both and compared.

A `World` holds a pool of pairs of tensors, the real one and the deferred one. An action is a function of one side and
of tensors of that side; the tables say what it is tried on. Compared are values, gradients, errors, and what a tensor
says of itself. Numbers of deferred tensors are compared when an action reads them, and at the end: to compare is to
read.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fusedhead.deferred.graph_outputs import StaleLogits
from tests.deferred.actions import (
    CHANGES,
    COMPILES,
    MEETINGS,
    MODES,
    OPTIMIZERS,
    STATISTICS,
    STEPS,
    UNCOMPILED,
)
from tests.deferred.heads import D, V, is_deferred
from tests.deferred.machine_models import B, Pair, Side, T, close_frames, compiled, numbers, tensors_of, written_since

POOL = 10
# what is told of each step, as it begins; the variable: print it, for a program that ends the process
watchers: list[Callable[[str], None]] = []
if os.environ.get("FUSEDHEAD_MACHINE_TRACE"):
    watchers.append(lambda step: print(step, file=sys.stderr, flush=True))


# errors of eager code at what need not be one: a checkpoint that finds a parameter frozen since, and a write to a view
# that an autograd function has made
EAGER_ALONE = ("during the original forward and recomputation", "This view was created inside a custom Function")


class Difference(AssertionError):
    """What a deferred tensor did that the tensor it stands for does not."""


class World:
    """Both programs, side by side."""

    def __init__(self, form: str) -> None:
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
        self.pairs: list[Pair] = []
        self.forwards: list[list[tuple[Tensor, int, Tensor | None]]] = []  # operands, their versions and values
        self.steps: list[str] = []
        self.deferred = self.waiting = self.stale = 0
        self.unseen: set[int] = set()  # forwards whose weight was written to in a way that leaves no trace
        self.coarse_gradients = self.coarse_weights = False  # whether some were computed in half precision

    def written(self, pairs: Sequence[Pair]) -> bool:
        """Whether something that the pairs are made of was written since."""
        operands = [o for pair in pairs for at in pair.made_of for o in self.forwards[at]]
        return any(written_since(*operand) for operand in operands)

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

    # how it is compared

    def both(self, action: Callable[..., Any], chosen: Sequence[Pair], mode: str, runs_forward: bool = False) -> None:
        outcomes = []
        for side, tensors in zip(self.sides, ([p.real for p in chosen], [p.other for p in chosen])):
            run = (lambda _, side=side: action(side)) if runs_forward else (lambda *t, side=side: action(side, *t))
            given = [side.tokens] if runs_forward else tensors
            outcomes.append(self.outcome(lambda run=run, given=given: MODES[mode](run, *given)))
        if self.errors(outcomes, chosen):
            self.forget(chosen)
            return
        expected, found = (value for _, value in outcomes)
        coarse = mode == "autocast" or self.coarse_weights or any(pair.coarse for pair in chosen)
        reals, others = tensors_of(expected), tensors_of(found)
        self.check(len(reals) == len(others), f"{len(others)} results for {len(reals)}")
        if not reals:
            return self.same_numbers(found, expected, coarse)
        made_of = frozenset().union(*(pair.made_of for pair in chosen)) if chosen else frozenset()
        for real, other in zip(reals, others):
            known = next((pair for pair in self.pairs if pair.real is real), None)
            if known is not None:
                self.check(known.other is other, "eager code hands the same tensor back, this another")
            pair = known or Pair(real, other, made_of, coarse or real.dtype in (torch.bfloat16, torch.float16))
            pair.coarse |= coarse
            self.looks(pair)
            if known is None:
                self.pairs.append(pair)
                self.deferred += is_deferred(other)
            if not is_deferred(other):
                self.same_numbers(other, real, pair.coarse)
        del self.pairs[: max(0, len(self.pairs) - POOL)]

    def outcome(self, run: Callable[[], Any]) -> tuple[bool, Any]:
        try:
            return True, run()
        except Exception as error:
            close_frames(error)
            return False, error

    def errors(self, outcomes: Sequence[tuple[bool, Any]], chosen: Sequence[Pair], backward: bool = False) -> bool:
        """Whether there was an error; what it must not be is a difference."""
        (fine, expected), (fine_too, found) = outcomes
        if fine_too and fine:
            return False
        if not fine_too:
            if isinstance(found, StaleLogits) and self.written(chosen):
                self.stale += 1
                return True
            if isinstance(found, RuntimeError) and "is asked for after a loss was taken" in str(found):
                return True
        # what a backward needs and finds written may be needed by one of the two formulas alone
        if backward and (not fine or not fine_too):
            error = found if fine else expected
            if "modified by an inplace operation" in str(error) or isinstance(error, StaleLogits):
                self.check(self.changed(), f"{error} though nothing was written")
                return True
        if fine_too and any(sentence in str(expected) for sentence in EAGER_ALONE):
            return True
        if fine or fine_too or not isinstance(found, type(expected)):
            said = "no error" if fine else f"{type(expected).__name__}: {expected}"
            mine = "no error" if fine_too else f"{type(found).__name__}: {found}"
            error = None if fine_too else found
            raise Difference(f"{mine}, where eager code gives {said}\n{self}") from error
        return True

    def changed(self) -> bool:
        return any(word in step for step in self.steps for word in ("writ", "steps", "filled", "copied into"))

    def forget(self, chosen: Sequence[Pair]) -> None:
        self.pairs = [pair for pair in self.pairs if pair not in chosen]

    def looks(self, pair: Pair) -> None:
        for name in ("shape", "dtype", "requires_grad", "is_leaf"):
            real, other = getattr(pair.real, name), getattr(pair.other, name)
            self.check(real == other, f"{name} is {other}, not {real}")
        self.check(pair.real.is_inference() == pair.other.is_inference(), "one is an inference tensor")
        self.check((pair.real.grad_fn is None) == (pair.other.grad_fn is None), "one has a grad_fn")
        strides = [t.stride() for t in (pair.real, pair.other)]
        self.check(strides[0] == strides[1], f"strides {strides[1]}, not {strides[0]}")

    def same_numbers(self, found: Any, expected: Any, coarse: bool) -> None:
        limits = {"rtol": 5e-2, "atol": 5e-2} if coarse else {"rtol": 2e-4, "atol": 2e-5}
        integers = isinstance(expected, Tensor) and not expected.is_floating_point()
        if (coarse and integers) or isinstance(expected, str) or expected is None:
            self.check(isinstance(expected, Tensor) or found == expected, f"{found}, not {expected}")
            return
        try:
            with torch.no_grad():
                if isinstance(found, Tensor):
                    found, expected = numbers(found), numbers(expected)
                torch.testing.assert_close(found, expected, equal_nan=True, check_stride=False, **limits)
        except AssertionError as error:
            raise Difference(f"{error}\n{self}") from None

    def gradients(self, coarse: bool) -> None:
        pairs = zip(self.sides[0].model.named_parameters(), self.sides[1].model.parameters())
        for (name, real), other in pairs:
            self.check((real.grad is None) == (other.grad is None), f"one {name} has a gradient, the other has none")
            if real.grad is not None:
                size = float(real.grad.abs().max()) or 1.0
                coarse = coarse or self.coarse_gradients or any(pair.coarse for pair in self.pairs)
                limit = (0.1 if coarse else 2e-3) * size + 1e-6
                error = float((real.grad - other.grad).abs().max())
                fine = error <= limit or not real.grad.isfinite().all()
                self.check(bool(fine), f"the gradient of {name} is off by {error}")
        for pair in self.pairs:
            both = (pair.real, pair.other)
            own = [self.outcome(lambda t=t: t.grad if t.retains_grad or t.is_leaf else None) for t in both]
            if self.errors(own, [pair]):
                continue
            real, other = (value for _, value in own)
            self.check((real is None) == (other is None), "one tensor has a gradient of its own")
            if real is not None:
                self.same_numbers(other, real, pair.coarse)

    def end(self) -> None:
        """Read everything."""
        for pair in self.pairs:
            if not pair.other.is_floating_point() and pair.coarse:
                continue
            self.waiting += is_deferred(pair.other)
            outcomes = [self.outcome(lambda t=t: numbers(t)) for t in (pair.real, pair.other)]
            if not self.errors(outcomes, [pair]):
                self.same_numbers(outcomes[1][1], outcomes[0][1], pair.coarse)
        self.gradients(False)

    def check(self, holds: bool, sentence: str) -> None:
        if not holds:
            raise Difference(f"{sentence}\n{self}")

    def say(self, step: str) -> None:
        self.steps.append(step)
        for watcher in watchers:
            watcher(step)

    def __str__(self) -> str:
        return "\n".join([f"form {self.sides[0].model.form!r}", *self.steps])


@contextmanager
def room_for_variants() -> Iterator[None]:
    """Dynamo compiles a graph anew for each grad mode, dtype and set of frozen parameters."""
    with torch._dynamo.config.patch(recompile_limit=500, accumulated_recompile_limit=5000):
        yield
