"""Call programs: the calls that lead to deferred logits, as a straight-line program over leaf tensors.

The leaves are the sources of the logits (hidden states, weight ...) and the other operands of later calls. Programs are
hashable keys of a cache: equal calls on tensors of the same kind are analysed once. A key holds which numbers of tokens
are equal, not their values.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Unreadable(Exception):
    """Raised for an argument that a program cannot hold."""


class Leaf(NamedTuple):
    """The at-th leaf tensor."""

    at: int


class Made(NamedTuple):
    """The result of a step, or one of its results."""

    step: int
    part: int | None = None


class Mode(NamedTuple):
    """The modes that decide what a call does besides its arguments."""

    grad: bool
    autocast: torch.dtype | None  # None where autocast is off on the tensors' device
    inference: bool = False

    @staticmethod
    def now(device: str) -> Mode:
        on = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if on else None
        return Mode(torch.is_grad_enabled(), dtype, torch.is_inference_mode_enabled())

    @property
    def read(self) -> Mode:
        """The mode in which a call is read on stand-ins. Rules do not depend on inference mode."""
        return self._replace(inference=False)


@contextmanager
def modes(mode: Mode, device: str) -> Iterator[None]:
    """Run under recorded inference, grad and autocast modes."""
    same = torch.is_inference_mode_enabled() == mode.inference
    inference = nullcontext() if same else torch.inference_mode(mode.inference)
    autocast = torch.autocast(device, dtype=mode.autocast, enabled=mode.autocast is not None)
    with inference, torch.set_grad_enabled(mode.grad), autocast:
        yield


class CallStep(NamedTuple):
    func: Callable[..., Any]
    args: Hashable  # encoded
    kwargs: Hashable
    mode: Mode


@dataclass(frozen=True, eq=False)
class CallProgram:
    """Steps in order, and the result. Compared by identity."""

    steps: tuple[CallStep, ...]
    result: Leaf | Made
    serial: int = field(default_factory=itertools.count().__next__)

    def __call__(self, *leaves: Tensor, traced: bool = False) -> Any:
        """The result on given leaves, each step in its own modes.

        While a compiler traces, inference mode stays as it is: no tensor made in another is known to the compiler.
        """
        device, inference = leaves[0].device.type, torch.is_inference_mode_enabled()
        results: list[Any] = []

        def value(ref: Leaf | Made) -> Any:
            if isinstance(ref, Leaf):
                return leaves[ref.at]
            return results[ref.step] if ref.part is None else results[ref.step][ref.part]

        for step in self.steps:
            with modes(step.mode._replace(inference=inference) if traced else step.mode, device):
                results.append(step.func(*decode(step.args, value), **decode(step.kwargs, value)))
        return value(self.result)

    def __deepcopy__(self, memo: Any) -> CallProgram:
        return self


class Const(NamedTuple):
    """A number, string or torch constant with its type: 1, 1.0 and True are different arguments."""

    kind: type
    value: Any


class Container(NamedTuple):
    """A container of encoded entries."""

    kind: type
    entries: tuple


CONSTANTS = (
    int, float, bool, str, type(None), type(Ellipsis), torch.dtype, torch.device, torch.layout, torch.memory_format,
)  # fmt: skip


def encode(value: Any, tensor: Callable[[Tensor], Hashable]) -> Any:
    """``value`` in hashable form, with every tensor replaced by ``tensor(it)``."""
    if isinstance(value, Tensor):
        return tensor(value)
    kind = type(value)
    if kind in CONSTANTS:
        return Const(kind, value)
    if kind is slice:
        return Container(slice, tuple(encode(v, tensor) for v in (value.start, value.stop, value.step)))
    if isinstance(value, (list, tuple)):
        plain = kind if kind in (list, tuple) else tuple if kind is torch.Size else None
        if plain is not None:
            return Container(plain, tuple(encode(v, tensor) for v in value))
    if kind is dict and all(type(k) is str for k in value):
        return Container(dict, tuple((k, encode(v, tensor)) for k, v in value.items()))
    raise Unreadable(f"an argument of type {kind.__name__}")


def decode(code: Any, resolve: Callable[[Leaf | Made], Any]) -> Any:
    """The inverse of `encode`, with every reference replaced by ``resolve(it)``."""
    if isinstance(code, Const):
        return code.value
    if isinstance(code, Container):
        if code.kind is dict:
            return {k: decode(v, resolve) for k, v in code.entries}
        entries = [decode(v, resolve) for v in code.entries]
        return slice(*entries) if code.kind is slice else code.kind(entries)
    return resolve(code)


def relocated(code: Any, leaves: Sequence[Leaf | Made], steps: Sequence[int]) -> Any:
    """A code whose references are put in the place of its leaves, and that counts other steps."""
    if isinstance(code, Leaf):
        return leaves[code.at]
    if isinstance(code, Made):
        return Made(steps[code.step], code.part)
    if isinstance(code, Container):
        if code.kind is dict:
            return Container(dict, tuple((k, relocated(v, leaves, steps)) for k, v in code.entries))
        return Container(code.kind, tuple(relocated(v, leaves, steps) for v in code.entries))
    return code


def joined(programs: Sequence[tuple[CallProgram, Sequence[Leaf]]]) -> tuple[list[CallStep], list[Made]]:
    """Programs concatenated, with equal steps merged.

    Each comes with the places of its leaves among the joint leaves. Returns the steps and each program's result.
    """
    steps: list[CallStep] = []
    positions: dict[CallStep, int] = {}
    results = []
    for program, leaves in programs:
        places: list[int] = []
        for step in program.steps:
            args, kwargs = relocated(step.args, leaves, places), relocated(step.kwargs, leaves, places)
            moved = step._replace(args=args, kwargs=kwargs)
            if moved not in positions:
                positions[moved] = len(steps)
                steps.append(moved)
            places.append(positions[moved])
        results.append(Made(places[program.result.step], program.result.part))
    return steps, results


class Shape(NamedTuple):
    """What a key knows of a tensor. Sizes above 1 are places in a list of the distinct sizes met so far."""

    sizes: tuple
    strides: tuple
    dtype: torch.dtype
    device: torch.device
    grad: bool


def shapes(leaves: Sequence[Tensor], exact: frozenset[int] | None) -> tuple[Shape, ...]:
    """The shapes of tensors, up to a renaming of the sizes that are not in ``exact`` (None: all are)."""
    met: dict[int, int] = {}

    def size(n: int) -> Any:
        return n if exact is None or n in exact else ("n", met.setdefault(n, len(met)))

    def order(t: Tensor) -> tuple:
        """The strides, or only which dimension lies inside which."""
        strides = t.stride()
        return strides if exact is None else (t.is_contiguous(), *sorted(range(t.ndim), key=lambda d: -strides[d]))

    return tuple(Shape(tuple(map(size, t.shape)), order(t), t.dtype, t.device, t.requires_grad) for t in leaves)
