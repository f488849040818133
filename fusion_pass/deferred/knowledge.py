"""What deferred logits know: where they come from, which calls lead to them, and whether that still holds.

Plain data and its upkeep. The tensor that carries it is `deferred.tensor`'s, and this file does not know it.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedhead.compat import FakeTensorMode
from fusedhead.deferred.outcome import Guard, Outcome
from fusedhead.deferred.program import Mode, Program, decode, modes, unobserved
from fusedhead.deferred.steps import steps
from fusedhead.returned import Recipe


class StaleLogits(RuntimeError):
    """Deferred logits were asked for after what they are made of had changed."""


class Layout(NamedTuple):
    """What can be asked of a tensor without computing it."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    grad: bool  # whether a gradient flows through it


@dataclass(eq=False)
class Origin:
    """One returned tensor of one compiled graph, and what has been learnt about calls on it."""

    recipe: Recipe
    memory: int
    rows_from: int  # bytes of logits from which on it pays to compute something token by token
    recorded: dict[Hashable, tuple[tuple[Program, ...], list[Layout], Any]] = field(default_factory=dict)
    outcomes: dict[Hashable, list[tuple[Guard, Outcome]]] = field(default_factory=dict)
    lock: threading.RLock = field(default_factory=threading.RLock)

    def __post_init__(self) -> None:
        self.exact = frozenset({0, 1, *self.recipe.exact})


@dataclass(eq=False)
class Recorded:
    """A call that was not made yet. Its arguments are encoded over ``tensors``."""

    func: Callable[..., Any]
    args: Any
    kwargs: Any
    tensors: tuple[Tensor, ...]
    mode: Mode
    result: Any = None

    def on(self, tensors: Sequence[Tensor]) -> Any:
        """The call, made with other tensors in the place of its own."""
        args = decode(self.args, lambda leaf: tensors[leaf.at])  # type: ignore[union-attr]
        kwargs = decode(self.kwargs, lambda leaf: tensors[leaf.at])  # type: ignore[union-attr]
        return self.func(*args, **kwargs)

    def made(self, existing: Callable[[Tensor], Tensor]) -> Any:
        """The result on tensors that exist, computed once, in the modes it was recorded under."""
        if self.result is None:
            tensors = list(map(existing, self.tensors))
            with modes(self.mode, tensors[0].device.type):
                self.result = self.on(tensors)
        return self.result

    def layouts(self) -> tuple[list[Layout], Any]:
        """The layouts of the results, found on fake tensors, and the container they come in (None: a single one)."""
        with unobserved(), FakeTensorMode() as fakes:
            like = [
                torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device, requires_grad=t.requires_grad)
                for t in self.tensors
            ]
            with modes(self.mode, self.tensors[0].device.type), fakes:
                result = self.on(like)
        many = None if isinstance(result, Tensor) else type(result)
        results = [result] if many is None else list(result)
        return [Layout(tuple(r.shape), tuple(r.stride()), r.dtype, r.requires_grad) for r in results], many


@dataclass(eq=False)
class Family:
    """Everything made of one returned tensor."""

    lock: threading.RLock = field(default_factory=threading.RLock)
    members: list[weakref.ref] = field(default_factory=list)
    passed_by: bool = False  # whether a result was made of their sources through which a gradient flows, past them

    def join(self, member: Tensor) -> None:
        if len(self.members) > 256:
            self.members = [m for m in self.members if m() is not None]
        self.members.append(weakref.ref(member))


class State(NamedTuple):
    """What changes when a tensor is written to or given other memory, and the tensor's name in an error."""

    version: int
    address: int
    steps: int  # of optimizers: fused ones leave the version as it was
    name: str


@dataclass(eq=False)
class Knowledge:
    """What a `DeferredLogits` knows besides its shape."""

    origin: Origin | None  # None inside a compiler
    program: Program
    leaves: tuple[Tensor, ...]
    states: tuple[State, ...]  # of the leaves, when they were taken in
    recorded: Recorded  # the call that makes it ...
    part: int | None  # ... or one of its results
    family: Family
    layout: Layout
    # statistics by name, [N], rows in order; those under True were made with gradients recorded
    statistics: dict[bool, dict[str, Tensor]] = field(default_factory=dict)


def state(tensor: Tensor, name: str = "an operand") -> State:
    version = 0 if tensor.is_inference() else tensor._version
    computed = not tensor.is_leaf and tensor._base is None  # its memory is no parameter's
    return State(version, tensor.data_ptr(), 0 if computed else steps(tensor), name)


def check_fresh(known: Knowledge) -> None:
    """Raise StaleLogits if a leaf has changed since it was taken in."""
    for leaf, before in zip(known.leaves, known.states):
        now = state(leaf, before.name)
        freed = leaf.untyped_storage().nbytes() == 0 and leaf.numel() > 0
        if now == before and not freed:
            continue
        how = (
            "has been freed or moved" if freed or now.address != before.address
            else "has been stepped by an optimizer" if now.version == before.version
            else f"has been changed in place (version {before.version}, now {now.version})"
        )  # fmt: skip
        raise StaleLogits(
            f"these logits were deferred, and {before.name}, which they are made of, {how} since the forward pass. "
            "Read them before that (for a weight: before optimizer.step()), or compile with "
            'options={"fusedhead.logits": "eager"} (FUSEDHEAD_LOGITS=eager), which computes logits at once.'
        )
