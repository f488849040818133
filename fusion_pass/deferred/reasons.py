"""Why deferred logits are built, or can no longer be: from a call, at once, or after a write."""

from __future__ import annotations

from fusedhead.graph.reasons import Reason


class Unanswered(Reason):
    """A call on deferred logits needs their numbers."""

    NO_STATISTIC = "the result is no statistic of the rows"
    OTHERWISE_PICKED = "some of the heads that are stacked are asked for, in another way than by their number"
    NOT_ONE_SWEEP = "the call has no sweep, or several"
    DEPENDS_ON_SIZES = "its reading depends on sizes"
    FAILED = "{kind}: {error}"


class BuiltAtOnce(Reason):
    """Returned logits are built before anybody reads them: deferring them would not pay."""

    FEW_LOGITS = "fewer logits than fusedhead.min_logits"
    FEW_TOKENS = "no gradient is recorded, and fewer than {least} tokens"
    LARGE_COPY = "FSDP2 frees the weight before they are read, and a copy of it would be larger than they are"


class Stale(Reason):
    """What deferred logits are made of has changed since the forward pass."""

    FREED = "has been freed or moved"
    WRITTEN = "has been changed in place (version {before}, now {now})"
    STEPPED = "has been stepped by an optimizer"
    WRITTEN_UNSEEN = "has been changed in place, through .data or by its memory,"
