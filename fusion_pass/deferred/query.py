"""A query: one call on deferred logits, looked up or analysed, and answered.

The outcome is cached by the call's form, so that the next batch finds it, whatever its size.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fusedhead.deferred.call_program import (  # fmt: skip
    CallStep,
    Leaf,
    Made,
    Mode,
    encode,
    joined,
    modes,
    relocated,
    shapes,
)
from fusedhead.deferred.lower import read_call
from fusedhead.deferred.reasons import Unanswered
from fusedhead.deferred.results import (  # fmt: skip
    ALWAYS,
    Answer,
    DependsOnSizes,
    Guard,
    Outcome,
    Swept,
    TokenByToken,
    Unread,
    Wide,
)
from fusedhead.deferred.shared_statistics import ancestry, furthest_source, known_statistic
from fusedhead.deferred.state import (
    DeferredState,
    GraphOutput,
    RecordedCall,
    Recording,
    Snapshot,
    check_fresh,
    snapshot,
)
from fusedhead.deferred.surroundings import checkpoint, out_of_sight, trial
from fusedhead.deferred.tensor import DeferredLogits
from fusedhead.graph.aliases import storage
from fusedhead.graph.reasons import refuse
from fusedhead.graph.run_counts import Run
from fusedhead.kernels.contract import STATS

log = logging.getLogger("fusedhead")
LEARNT = 1024  # calls remembered for one head before all are forgotten
VARIANTS = 8  # readings of one call for different sizes, before sizes are taken as they are
RESORT = Unread(refuse(Unanswered.DEPENDS_ON_SIZES))


class NotRecorded(Exception):
    """Raised for a call that cannot be recorded: it needs the numbers, or fails. Making it on plain tensors decides."""


class Request:
    """One call on deferred logits and its answer."""

    def __init__(self, recorded: RecordedCall) -> None:
        self.recorded = recorded
        self.subjects = [t for t in recorded.tensors if isinstance(t, DeferredLogits)]
        graph_outputs = [t._deferred.graph_output for t in self.subjects]
        assert None not in graph_outputs, "a compiler's stand-in is handled by the compiler"
        self.graph_output: GraphOutput = graph_outputs[0]  # type: ignore[assignment]  # it keeps what is learnt
        self.exact = frozenset().union(*(output.exact for output in graph_outputs))  # type: ignore[union-attr]
        self.leaves: list[Tensor] = []
        self.snapshots: list[Snapshot] = []
        # what each tensor of the call is: a program with the places of its leaves, or a leaf
        self.refs = [
            (t._deferred.program, self.places(t._deferred)) if isinstance(t, DeferredLogits) else (None, self.place(t))
            for t in recorded.tensors
        ]
        self.what = (recorded.func, recorded.args, recorded.kwargs, recorded.mode, tuple(self.refs))

    def places(self, state: DeferredState) -> tuple[Leaf, ...]:
        return tuple(self.place(leaf, at) for leaf, at in zip(state.leaves, state.snapshots))

    def place(self, tensor: Tensor, at: Snapshot | None = None) -> Leaf:
        for i, (leaf, then) in enumerate(zip(self.leaves, self.snapshots)):
            if leaf is tensor or (at is not None and same(leaf, then, tensor, at)):
                return Leaf(i)
        self.leaves.append(tensor)
        self.snapshots.append(snapshot(tensor) if at is None else at)
        return Leaf(len(self.leaves) - 1)

    def steps(self, states: Sequence[DeferredState] = ()) -> tuple[list[CallStep], list[Made]]:
        """The steps that lead to the call, the call last, and the places of the subjects and ``states`` in them."""
        programs = [ref for ref in self.refs if ref[0] is not None]
        steps, results = joined([*programs, *((k.program, self.places(k)) for k in states)])
        places = iter(results)
        table = [ref[1] if ref[0] is None else next(places) for ref in self.refs]
        call = self.recorded
        step = CallStep(call.func, relocated(call.args, table, ()), relocated(call.kwargs, table, ()), call.mode)
        return [*steps, step], results

    def outcome(self) -> Outcome:
        """The outcome of the call, cached or analysed."""
        with self.graph_output.lock:
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
        """The cached readings of this call on tensors of this form."""
        outcomes, key = self.graph_output.outcomes, (self.what, shapes(self.leaves, exact))
        if key not in outcomes and len(outcomes) > LEARNT:
            outcomes.clear()
        return outcomes.setdefault(key, [])

    def for_these_sizes(self) -> Outcome:
        variants = self.variants(None)
        if not variants:
            variants.append(self.learn(None))
        return variants[0][1]

    def learn(self, exact: frozenset[int] | None) -> tuple[Guard, Outcome]:
        if exact is not None and not self.runs_on_stand_ins():
            return ALWAYS, RESORT
        chain = list(ancestry(self.subjects[0]))
        steps, refs = self.steps([t._deferred for t in chain])
        subjects, lineage = refs[: len(self.subjects)], refs[len(self.subjects) :]
        call = self.recorded
        try:
            with trial():
                guard, outcome = read_call(steps, subjects, self.leaves, exact, lineage, self.graph_output.memory)
        except DependsOnSizes:
            return ALWAYS, RESORT
        except Exception as error:  # never in the way: the plain tensor is always right
            log.warning("fusedhead: %s of deferred logits could not be read", call.func, exc_info=True)
            guard, outcome = ALWAYS, Unread(refuse(Unanswered.FAILED, kind=type(error).__name__, error=error))
        if isinstance(outcome, Unread) and exact is None:
            name = getattr(call.func, "__name__", call.func)
            log.info("deferred logits are computed for %s: %s", name, outcome.refusal)
        return guard, outcome

    def runs_on_stand_ins(self) -> bool:
        """Whether the call needs no numbers: found with sizes that are numbers, before it is tried with symbols."""
        try:
            self.recorded.on_stand_ins()
        except Exception:  # made on real tensors, it will say
            return False
        return True

    def pays(self, outcome: Outcome) -> bool:
        """Whether there are enough logits for a token program, if the answer is one."""
        held = outcome.held if isinstance(outcome, (TokenByToken, Wide)) else None
        return held is None or held.of(self.leaves) >= self.graph_output.rows_from

    def answered(self, outcome: Answer) -> Any:
        for subject in self.subjects:
            check_fresh(subject._deferred)
        with modes(self.recorded.mode._replace(autocast=None), self.leaves[0].device.type):
            if isinstance(outcome, Swept):
                statistics = self.statistics(outcome)
                results = outcome.tail.forward(*self.leaves, *statistics)
                if outcome.sharing.shareable:
                    results = unshared(results, statistics)
            else:
                results = outcome.run.forward(*self.leaves)
        if any(isinstance(result, Tensor) and result.requires_grad for result in results):
            for shared in {id(t._deferred.shared): t._deferred.shared for t in self.subjects}.values():
                shared.gradient_bypassed = True
                for result in results:
                    shared.gather_before(result)
        self.count(outcome)
        return results[0] if outcome.many is None else outcome.many(results)

    def count(self, outcome: Answer) -> None:
        """Count the answer at its heads. Of heads that were returned in one tensor it may use some only."""
        runs: dict[Run, None] = {}
        for subject in self.subjects:
            recipe = subject._deferred.graph_output.recipe  # type: ignore[union-attr]
            if not recipe.weights:
                runs |= dict.fromkeys(recipe.runs)
                continue
            read = outcome.operands if isinstance(outcome, Swept) else outcome.run
            placeholders = [node for node in read.graph.nodes if node.op == "placeholder"]
            places = self.places(subject._deferred)
            for run, weight in zip(recipe.runs, recipe.weights):
                if any(placeholders[places[at].at].users for at in weight):
                    runs[run] = None
        for run in runs:
            run.answered.add()

    def statistics(self, outcome: Swept) -> list[Tensor]:
        """The statistics that ``outcome`` needs, from earlier sweeps or from a new one."""
        sharing, subject = outcome.sharing, self.subjects[0]
        grad = Recording.of(self.recorded.mode.grad and not sharing.detached, self.recorded.mode)
        # a mode that counts ops must not see this sweep, since an earlier call may have made it unnecessary; in the
        # checkpointed region that returned the logits, both passes make the same calls and have to save its tensors
        shared = subject._deferred.shared
        with shared.lock, out_of_sight(hooks_see=shared.returned_in(checkpoint())):
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

    def sweep(self, outcome: Swept, grad: Recording) -> dict[str, Tensor]:
        sharing = outcome.sharing
        asks = {*outcome.asks, *(sharing.likely if sharing.shareable else ())}
        names = [name for name in STATS if name in asks]
        operands = outcome.operands.forward(*self.leaves)
        got = torch.ops.fusedhead.head_stats(*operands, outcome.transform, ",".join(names), outcome.memory)
        have = dict(zip(STATS, got))
        home, _ = furthest_source(self.subjects[0], sharing.relations)
        kept = {name: have[name] for name in names if name in sharing.shareable}
        home._deferred.statistics.setdefault(grad, {}).update(kept)
        return have


def same(leaf: Tensor, then: Snapshot, other: Tensor, at: Snapshot) -> bool:
    """Whether two leaves are one tensor at one time with one autograd history."""
    return then.is_of(at) and leaf.requires_grad == other.requires_grad


def sweep_whole(tensor: DeferredLogits, name: str, class_dim: int) -> None:
    """One sweep over logits whose pieces are queried one after another."""
    args, none = encode((tensor, class_dim), lambda _: Leaf(0)), encode({}, lambda _: Leaf(0))
    mode = Mode.now(tensor.device.type)
    request = Request(RecordedCall(torch.logsumexp, args, none, (tensor,), mode))
    outcome = request.outcome()
    if isinstance(outcome, Swept) and name in outcome.sharing.shareable:
        grad = Recording.of(mode.grad and not outcome.sharing.detached, mode)
        request.sweep(replace(outcome, asks=(*outcome.asks, name)), grad)


def unshared(results: Sequence[Any], statistics: Sequence[Tensor]) -> list[Any]:
    """Copies of results that share memory with cached statistics, so that a write to a result does not change these."""
    kept = {storage(statistic) for statistic in statistics}
    return [x.clone() if isinstance(x, Tensor) and storage(x) in kept else x for x in results]
