"""One call on deferred logits: recorded for later, or looked up, learnt and answered.

What was learnt about a call is kept by its form, so that the next batch finds it again, whatever its size.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fusedhead.deferred_knowledge import Knowledge, Origin, Recorded, State, check_fresh, state
from fusedhead.deferred_outcome import (
    ALWAYS,
    Answer,
    DependsOnSizes,
    Guard,
    Outcome,
    Swept,
    TokenByToken,
    Unread,
    Wide,
)  # fmt: skip
from fusedhead.deferred_picks import Pick, Picks
from fusedhead.deferred_program import (
    Const,
    Group,
    Leaf,
    Made,
    Mode,
    Program,
    Step,
    encode,
    joined,
    modes,
    relocated,
    shapes,
    unobserved,
)  # fmt: skip
from fusedhead.deferred_reading import read_call
from fusedhead.deferred_sweeps import ancestry, known_statistic, top
from fusedhead.deferred_tensor import DeferredLogits, linked
from fusedhead.kernels.contract import STATS

log = logging.getLogger("fusedhead")
LEARNT = 1024  # calls remembered for one head before all are forgotten
VARIANTS = 8  # readings of one call for different sizes, before sizes are taken as they are
RESORT = Unread("its reading depends on sizes")


class NotRecorded(Exception):
    """The call cannot be made without the numbers, or not at all: making it will say."""


class Request:
    """One call on deferred logits, on the way to its answer."""

    def __init__(self, recorded: Recorded) -> None:
        self.recorded = recorded
        self.subjects = [t for t in recorded.tensors if isinstance(t, DeferredLogits)]
        origins = [t._known.origin for t in self.subjects]
        assert None not in origins, "a compiler's stand-in is handled by the compiler"
        self.origin: Origin = origins[0]  # type: ignore[assignment]  # it keeps what is learnt
        self.exact = frozenset().union(*(origin.exact for origin in origins))  # type: ignore[union-attr]
        self.leaves: list[Tensor] = []
        self.states: list[State] = []
        # what each tensor of the call is: a program with the places of its leaves, or a leaf
        self.refs = [
            (t._known.program, self.places(t._known)) if isinstance(t, DeferredLogits) else (None, self.place(t))
            for t in recorded.tensors
        ]
        self.what = (recorded.func, recorded.args, recorded.kwargs, recorded.mode, tuple(self.refs))

    def places(self, known: Knowledge) -> tuple[Leaf, ...]:
        return tuple(self.place(leaf, at) for leaf, at in zip(known.leaves, known.states))

    def place(self, tensor: Tensor, at: State | None = None) -> Leaf:
        for i, known in enumerate(self.leaves):
            if known is tensor:
                return Leaf(i)
        self.leaves.append(tensor)
        self.states.append(state(tensor) if at is None else at)
        return Leaf(len(self.leaves) - 1)

    def record(self) -> Any:
        """Deferred logits for the result."""
        call, origin = self.recorded, self.origin
        key = (self.what, tuple(
            t._known.layout if isinstance(t, DeferredLogits) else (t.shape, t.stride(), t.dtype, t.requires_grad)
            for t in call.tensors
        ))  # fmt: skip
        known = origin.recorded.get(key)
        if known is None:
            try:
                layouts, many = call.layouts()
            except Exception as error:
                raise NotRecorded from error
            with origin.lock:
                if len(origin.recorded) > LEARNT:
                    origin.recorded.clear()
                known = origin.recorded.setdefault(key, (self.programs(layouts, many), layouts, many))
        programs, layouts, many = known
        leaves, states, family = tuple(self.leaves), tuple(self.states), self.subjects[0]._known.family
        results = [
            linked(Knowledge(origin, program, leaves, states, call, None if many is None else part, family, layout))
            for part, (program, layout) in enumerate(zip(programs, layouts))
        ]
        for subject in self.subjects[1:]:
            for result in results:  # a write to another head's logits concerns it too
                subject._known.family.join(result)
        return results[0] if many is None else many(results)

    def pick(self, rows: Picks) -> Any:
        """Deferred logits for rows picked by number, read as a choice by a tensor of numbers."""
        call, origin, before = self.recorded, self.origin, self.subjects[0]._known
        key = ("layouts", call.func, call.args, call.kwargs, call.mode.grad, before.layout)
        known = origin.recorded.get(key)
        if known is None:
            try:
                known = origin.recorded[key] = ((), *call.layouts())
            except Exception as error:
                raise NotRecorded from error
        _, layouts, many = known
        results = []
        for part, (chosen, layout) in enumerate(zip(rows, layouts)):
            numbers = [index(pick.rows, before.leaves[0].device) for pick in chosen]
            form = ("rows", before.program, call.mode, tuple((pick.dim, pick.drop) for pick in chosen))
            known = origin.recorded.get(form)
            if known is None:
                program = picking(before.program, len(before.leaves), chosen, call.mode)
                known = origin.recorded.setdefault(form, ((program,), [], None))
            results.append(linked(Knowledge(
                origin, known[0][0], (*before.leaves, *numbers), (*before.states, *map(state, numbers)), call,
                None if many is None else part, before.family, layout,
            )))  # fmt: skip
        return results[0] if many is None else many(results)

    def programs(self, layouts: Sequence[Any], many: Any) -> tuple[Program, ...]:
        """The programs of the results; the same ones for the same call on tensors of other sizes."""
        same = self.origin.recorded.get((self.what, len(layouts)))
        if same is not None:
            return same[0]
        steps, _ = self.steps()
        last = len(steps) - 1
        made = tuple(Program(tuple(steps), Made(last, None if many is None else i)) for i in range(len(layouts)))
        self.origin.recorded[self.what, len(layouts)] = (made, [], many)
        return made

    def steps(self, others: Sequence[Knowledge] = ()) -> tuple[list[Step], list[Made]]:
        """The call and all that leads to it, and where the subjects and ``others`` are among the steps."""
        programs = [ref for ref in self.refs if ref[0] is not None]
        steps, results = joined([*programs, *((k.program, self.places(k)) for k in others)])
        made = iter(results)
        table = [ref[1] if ref[0] is None else next(made) for ref in self.refs]
        call = self.recorded
        step = Step(call.func, relocated(call.args, table, ()), relocated(call.kwargs, table, ()), call.mode)
        return [*steps, step], results

    def outcome(self) -> Outcome:
        """Look up what the call amounts to, or learn it."""
        with self.origin.lock:
            variants = self.variants(self.exact)
            for guard, outcome in variants:
                if guard.holds(self.leaves):
                    return outcome if outcome is not RESORT else self.for_these_sizes()
            if len(variants) >= VARIANTS:
                return self.for_these_sizes()
            variants.append(self.learn(self.exact))
            if not isinstance(variants[-1][1], Unread):
                return variants[-1][1]
            outcome = self.for_these_sizes()
            if not isinstance(outcome, Unread):
                variants[-1] = (ALWAYS, RESORT)
            elif variants[-1][1] is RESORT:
                variants[-1] = (ALWAYS, outcome)
            return outcome

    def variants(self, exact: frozenset[int] | None) -> list[tuple[Guard, Outcome]]:
        """What has been learnt about this call on tensors like these."""
        known, key = self.origin.outcomes, (self.what, shapes(self.leaves, exact))
        if key not in known and len(known) > LEARNT:
            known.clear()
        return known.setdefault(key, [])

    def for_these_sizes(self) -> Outcome:
        variants = self.variants(None)
        if not variants:
            variants.append(self.learn(None))
        return variants[0][1]

    def learn(self, exact: frozenset[int] | None) -> tuple[Guard, Outcome]:
        chain = list(ancestry(self.subjects[0]))
        steps, made = self.steps([t._known for t in chain])
        subjects, lineage = made[: len(self.subjects)], made[len(self.subjects) :]
        call = self.recorded
        try:
            with unobserved():
                guard, outcome = read_call(steps, subjects, self.leaves, exact, lineage, self.origin.memory)
        except DependsOnSizes:
            return ALWAYS, RESORT
        except Exception as error:  # never in the way: the plain tensor is always right
            log.warning("fusedhead: %s of deferred logits could not be read", call.func, exc_info=True)
            guard, outcome = ALWAYS, Unread(f"{type(error).__name__}: {error}")
        if isinstance(outcome, Unread) and exact is None:
            name = getattr(call.func, "__name__", call.func)
            log.info("deferred logits are computed for %s: %s", name, outcome.reason)
        return guard, outcome

    def pays(self, outcome: Outcome) -> bool:
        """Whether the logits are enough for a row program, if it takes one."""
        held = outcome.held if isinstance(outcome, (TokenByToken, Wide)) else None
        return held is None or held.of(self.leaves) >= self.origin.rows_from

    def answered(self, outcome: Answer) -> Any:
        for subject in self.subjects:
            check_fresh(subject._known)
        with modes(self.recorded.mode._replace(autocast=None), self.leaves[0].device.type):
            if isinstance(outcome, Swept):
                results = outcome.tail.forward(*self.leaves, *self.statistics(outcome))
            else:
                results = outcome.run.forward(*self.leaves)
        return results[0] if outcome.many is None else outcome.many(results)

    def statistics(self, outcome: Swept) -> list[Tensor]:
        """The statistics that ``outcome`` asks for, from earlier sweeps or from a new one."""
        sharing, subject = outcome.sharing, self.subjects[0]
        grad = self.recorded.mode.grad and not sharing.detached
        with subject._known.family.lock:
            have: dict[str, Any] = {}
            for name in outcome.asks:
                have[name] = (
                    known_statistic(subject, name, grad, sharing.relations, sweep_whole)
                    if sharing.shareable.issuperset(outcome.asks)
                    else None
                )
                if have[name] is None:
                    have = dict(self.sweep(outcome, grad))
                    break
        return [have[name] for name in outcome.asks]

    def sweep(self, outcome: Swept, grad: bool) -> dict[str, Tensor]:
        sharing = outcome.sharing
        asks = {*outcome.asks, *(sharing.likely if sharing.shareable else ())}
        names = [name for name in STATS if name in asks]
        operands = outcome.operands.forward(*self.leaves)
        got = torch.ops.fusedhead.head_stats(*operands, outcome.transform, ",".join(names), outcome.memory)
        have = dict(zip(STATS, got))
        home, _ = top(self.subjects[0], sharing.relations)
        kept = {name: have[name] for name in names if name in sharing.shareable}
        home._known.statistics.setdefault(grad, {}).update(kept)
        return have


def index(rows: range, device: torch.device) -> Tensor:
    return torch.arange(rows.start, rows.stop, rows.step, device=device)


def picking(before: Program, leaves: int, chosen: Sequence[Pick], mode: Mode) -> Program:
    """``before``, and then the rows that leaves from number ``leaves`` on hold the numbers of."""
    steps, at = list(before.steps), before.result
    none = encode({}, lambda _: Leaf(0))

    def add(func: Any, *args: Any) -> Made:
        code = Group(tuple, tuple(a if isinstance(a, (Leaf, Made)) else Const(int, a) for a in args))
        steps.append(Step(func, code, none, mode))
        return Made(len(steps) - 1)

    for i, pick in enumerate(chosen):
        at = add(Tensor.index_select, at, pick.dim, Leaf(leaves + i))
    for pick in reversed(chosen):
        if pick.drop:
            at = add(Tensor.squeeze, at, pick.dim)
    return Program(tuple(steps), at)


def sweep_whole(tensor: DeferredLogits, name: str, class_dim: int) -> None:
    """One sweep over logits whose pieces are asked for one after another."""
    args, none = encode((tensor, class_dim), lambda _: Leaf(0)), encode({}, lambda _: Leaf(0))
    mode = Mode.now(tensor.device.type)
    request = Request(Recorded(torch.logsumexp, args, none, (tensor,), mode))
    outcome = request.outcome()
    if isinstance(outcome, Swept) and name in outcome.sharing.shareable:
        request.sweep(replace(outcome, asks=(*outcome.asks, name)), mode.grad and not outcome.sharing.detached)
