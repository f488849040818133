"""Comparison of a program with its twin: values, gradients, errors, and what a tensor says of itself.

Numbers of deferred tensors are compared when an action reads them, and at the end: to compare is to read.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fusedhead.deferred.graph_outputs import DeferredLogits, StaleLogits, plain
from tests.deferred.heads import is_deferred
from tests.deferred.machine.models import Pair, Side

# what is told of each step, as it begins; the variable: print it, for a program that ends the process
watchers: list[Callable[[str], None]] = []
if os.environ.get("FUSEDHEAD_MACHINE_TRACE"):
    watchers.append(lambda step: print(step, file=sys.stderr, flush=True))

# what a tensor says of itself; of a part of what was written to, asking may be an error
LOOKS: dict[str, Callable[[Tensor], Any]] = {
    **{name: lambda t, name=name: getattr(t, name) for name in ("shape", "dtype", "requires_grad", "is_leaf")},
    "is_inference": lambda t: t.is_inference(),
    "strides": lambda t: t.stride(),
    "whether there is no grad_fn": lambda t: t.grad_fn is None,
}

# an error of eager code at what need not be one: a checkpoint that finds a parameter frozen since, or no longer
REFROZEN = "during the original forward and recomputation"
# a part of what was written to, where C++ uses it (autograd functions, torch.func): the numbers of what is deferred are
# right, and a backward raises the error
LATE = "is a view and its base or another view of its base has been modified inplace"


class Difference(AssertionError):
    """What a deferred tensor did that the tensor it stands for does not."""


def numbers(tensor: Tensor) -> Tensor:
    return plain(tensor).detach().clone() if isinstance(tensor, DeferredLogits) else tensor.detach().clone()


def tensors_of(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for v in value for t in tensors_of(v)] if isinstance(value, (list, tuple)) else []


def close_frames(error: BaseException) -> None:
    """End what an error has left suspended: `checkpoint` of torch 2.11 is a generator that keeps its hooks and modes.

    They would hold for whatever runs next, until the traceback goes, and then be taken off from under those of others.
    """
    each: BaseException | None = error
    while each is not None:
        traceback.clear_frames(each.__traceback__)
        each = each.__cause__ or each.__context__


def written_since(tensor: Tensor, version: int, value: Tensor | None) -> bool:
    now = 0 if tensor.is_inference() else tensor._version
    return now != version or (value is not None and not torch.equal(tensor, value))


class Comparison:
    """Both programs, the pairs of tensors they made, and what is known of each."""

    sides: tuple[Side, Side]

    def __init__(self) -> None:
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

    def outcome(self, run: Callable[[], Any]) -> tuple[bool, Any]:
        try:
            return True, run()
        except Exception as error:
            close_frames(error)
            return False, error

    def errors(self, outcomes: Sequence[tuple[bool, Any]], chosen: Sequence[Pair], backward: bool = False) -> bool:
        """Whether there was an error; what it must not be is a difference."""
        (fine, expected), (fine_too, actual) = outcomes
        if fine_too and fine:
            return False
        if not fine_too:
            if isinstance(actual, StaleLogits) and self.written(chosen):
                self.stale += 1
                return True
            if isinstance(actual, RuntimeError) and "is asked for after a loss was taken" in str(actual):
                # eager code may have a hook now: nothing that reaches it is compared
                self.forget([p for p in self.pairs if any(p.made_of & pair.made_of for pair in chosen)])
                return True
        # what a backward needs and finds written may be needed by one of the two formulas alone
        if backward and (not fine or not fine_too):
            error = actual if fine else expected
            if "modified by an inplace operation" in str(error):
                self.check(self.changed(), f"{error} though nothing was written")
                return True
        if fine_too and REFROZEN in str(expected):
            self.check(any("frozen" in step for step in self.steps), f"{expected} though nothing was frozen")
            return True
        if fine_too and LATE in str(expected):
            for tensor in tensors_of(actual):
                if tensor.requires_grad and not tensor.is_leaf:
                    late = self.outcome(lambda t=tensor: t.float().sum().backward())
                    self.check(LATE in str(late[1]), f"no error in a backward, where eager code gives {expected}")
            return True
        if fine or fine_too or not isinstance(actual, type(expected)):
            said = "no error" if fine else f"{type(expected).__name__}: {expected}"
            mine = "no error" if fine_too else f"{type(actual).__name__}: {actual}"
            error = None if fine_too else actual
            raise Difference(f"{mine}, where eager code gives {said}\n{self}") from error
        return True

    def changed(self) -> bool:
        return any(word in step for step in self.steps for word in ("writ", "steps", "filled", "copied into"))

    def forget(self, chosen: Sequence[Pair]) -> None:
        self.pairs = [pair for pair in self.pairs if pair not in chosen]

    def looks(self, pair: Pair) -> None:
        for name, look in LOOKS.items():
            outcomes = [self.outcome(lambda t=t, look=look: look(t)) for t in (pair.real, pair.other)]
            if not self.errors(outcomes, [pair]):
                (_, real), (_, other) = outcomes
                self.check(real == other, f"{name} is {other}, not {real}")

    def same_numbers(self, actual: Any, expected: Any, coarse: bool) -> None:
        limits = {"rtol": 5e-2, "atol": 5e-2} if coarse else {"rtol": 2e-4, "atol": 2e-5}
        integers = isinstance(expected, Tensor) and not expected.is_floating_point()
        if (coarse and integers) or isinstance(expected, str) or expected is None:
            self.check(isinstance(expected, Tensor) or actual == expected, f"{actual}, not {expected}")
            return
        try:
            with torch.no_grad():
                if isinstance(actual, Tensor):
                    actual, expected = numbers(actual), numbers(expected)
                torch.testing.assert_close(actual, expected, equal_nan=True, check_stride=False, **limits)
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
            outcomes = [self.outcome(lambda t=t: t.grad if t.retains_grad or t.is_leaf else None) for t in both]
            if self.errors(outcomes, [pair]):
                continue
            real, other = (value for _, value in outcomes)
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
