"""Shared statistics: row statistics of an earlier sweep serve views and row selections of the same logits.

A statistic is stored at the furthest ancestor with the same rows and transform. A selection of rows selects from the
statistics of its source.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from fusedhead.deferred.results import Relation
from fusedhead.deferred.state import DeferredState, Recording
from fusedhead.deferred.tensor import DeferredLogits

Relations = tuple[Relation | None, ...]

# sweeps over all rows, with a statistic and the vocabulary's dimension, if it can
SweepWhole = Callable[[DeferredLogits, str, int], None]


def made_of(state: DeferredState) -> DeferredLogits | None:
    """The first deferred tensor among those that the call takes."""
    return next((t for t in state.recorded.tensors if isinstance(t, DeferredLogits)), None)


def ancestry(tensor: DeferredLogits | None) -> Iterator[DeferredLogits]:
    """A deferred tensor, what it was made of, and so on."""
    while tensor is not None:
        yield tensor
        tensor = made_of(tensor._deferred)


def furthest_source(tensor: DeferredLogits, relations: Relations) -> tuple[DeferredLogits, Relations]:
    """The furthest tensor back that has the same rows through the same transform, and its relations."""
    while relations and relations[0] is not None and relations[0].same:
        before = made_of(tensor._deferred)
        assert before is not None
        tensor, relations = before, relations[1:]
    return tensor, relations


# results that serve where one of a kind is asked for
SERVED_BY = {
    Recording.DIFFERENTIABLE: (Recording.DIFFERENTIABLE,),
    Recording.PLAIN: (Recording.PLAIN, Recording.DIFFERENTIABLE),
    Recording.INFERENCE: (Recording.INFERENCE, Recording.PLAIN, Recording.DIFFERENTIABLE),
}


def of_kind(value: Tensor, recorded: Recording, wanted: Recording) -> Tensor:
    if wanted is recorded:
        return value
    return value.clone() if wanted is Recording.INFERENCE else value.detach()


def known_statistic(
    tensor: DeferredLogits, name: str, grad: Recording, relations: Relations, sweep_whole: SweepWhole
) -> Tensor | None:
    """A statistic [N] of these logits that an earlier sweep has computed, or None."""
    tensor, relations = furthest_source(tensor, relations)
    state = tensor._deferred
    for recorded in SERVED_BY[grad]:
        if name in state.statistics.get(recorded, ()):
            return of_kind(state.statistics[recorded][name], recorded, grad)
    whole = made_of(state)
    if whole is None or not relations or relations[0] is None:
        return None
    of_all = known_statistic(whole, name, grad, relations[1:], sweep_whole)
    if of_all is None and state.part is not None and name in ("lse", "entropy"):
        # one of several pieces: the others will be asked for too, and one sweep serves all
        sweep_whole(whole, name, relations[0].dims[0])
        of_all = known_statistic(whole, name, grad, relations[1:], sweep_whole)
    if of_all is None:
        return None
    before, after = relations[0].dims
    rows = [size for d, size in enumerate(whole.shape) if d != before]
    stand_in = of_all.reshape(rows).unsqueeze(before)
    chosen = state.recorded.on([stand_in if t is whole else t for t in state.recorded.tensors])
    chosen = chosen if state.part is None else chosen[state.part]
    return chosen.squeeze(after).reshape(-1)
