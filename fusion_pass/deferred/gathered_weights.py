"""Gathered weights: what replaces a weight that FSDP2 frees while deferred logits still need it.

FSDP2 gathers a unit's weights before its forward, and frees their memory after it, at the end of a backward, or on
request (``reshard()``, ``state_dict()``). Deferred logits use the gathered memory itself as long as it is there, which
costs nothing. When it is freed:

| who still needs it                                         | what replaces the weight                             |
|------------------------------------------------------------|------------------------------------------------------|
| nobody: the logits are gone, or exist                      | nothing                                              |
| logits, and it is no larger than they are, or this is the  | one copy, taken then, for all that waits: a read     |
| end of a backward, when all else has been given back       | needs no collective, whichever ranks make it         |
| logits, and it is larger                                   | the logits, built then, as eager code has them       |

A leaf keeps its gradient edge, which ends in the gathered parameter: its gradient is scattered by FSDP2's own
collective. What frees a gathered weight is one method of torch's, which is wrapped; where this torch has no such
method, or an operand is of a class of its own, operands are copied when logits are handed out.
"""

from __future__ import annotations

import logging
import math
import threading
import weakref
from collections.abc import Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from fusedhead.compat import graph_task, lookup
from fusedhead.deferred.reasons import BuiltAtOnce
from fusedhead.deferred.state import DeferredState, Snapshot
from fusedhead.deferred.surroundings import out_of_sight
from fusedhead.deferred.tensor import plain
from fusedhead.graph.reasons import refuse
from fusedhead.legality.sharding import FREES

log = logging.getLogger("fusedhead")
NO_ADDRESS = 0  # the address of freed memory: no tensor has it
PURGE = 64  # entries of `_waiting` before those that nobody needs are dropped

_guard = threading.Lock()
_waiting: dict[int, Any] = {}  # what is made of one memory, by its storage: a weakref.WeakSet of `DeferredState`
_seeing: list[bool] = []  # whether torch's method could be wrapped; empty before the first try


def sees_frees() -> bool:
    """Whether this file notices when FSDP2 frees a weight. Wraps torch's method at the first call."""
    if not _seeing:
        with _guard:
            if not _seeing:
                _seeing.append(wrap_free())
    return _seeing[0]


def wrap_free() -> bool:
    """Have the method of torch that frees a weight tell us first; False where this torch has none that we know."""
    module, name, method = FREES
    try:
        cls = lookup(module, name)
        original = getattr(cls, method)
        if "all_gather_outputs" not in cls.__annotations__:
            raise AttributeError("all_gather_outputs")
    except Exception as error:
        log.warning("fusedhead: weights under FSDP2 are copied, since this torch has no %s.%s.%s (%s)", *FREES, error)
        return False

    @wraps(original)
    def free(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _waiting:
            before_free([*self.all_gather_outputs, *getattr(self, "_unsharded_inner_tensors", ())])
        return original(self, *args, **kwargs)

    setattr(cls, method, free)
    return True


def is_watched(operand: Tensor) -> bool:
    """Whether what frees an operand is seen: its memory is its own storage."""
    return type(operand) in (Tensor, nn.Parameter) and operand.layout is torch.strided


def wait_for(state: DeferredState) -> None:
    """Remember deferred logits until they are gone: a weight that they are made of may be freed."""
    with _guard:
        if len(_waiting) > PURGE:
            for memory in [memory for memory, waiting in _waiting.items() if not waiting]:
                del _waiting[memory]
        for leaf in state.leaves:
            _waiting.setdefault(memory_of(leaf), weakref.WeakSet()).add(state)


def memory_of(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


# deferred logits, and their leaves in the memory in question
WaitingLogits = tuple[DeferredState, "list[tuple[Tensor, Snapshot]]"]


def before_free(gathered: Sequence[Tensor]) -> None:
    """Copy a weight, or build its logits, before its memory is freed. An error here never stops FSDP2."""
    for memory in map(memory_of, gathered):
        with _guard:
            states = list(_waiting.pop(memory, ()))
        waiting = [(state, leaves_in(state, memory)) for state in states]
        try:
            provide([entry for entry in waiting if entry[1] and unbuilt(entry[0])])
        except Exception:
            log.warning("fusedhead: a weight that deferred logits are made of is freed", exc_info=True)
        for _, leaves in waiting:
            for leaf, at in leaves:
                if memory_of(leaf) == memory:
                    at.address = NO_ADDRESS


def leaves_in(state: DeferredState, memory: int) -> list[tuple[Tensor, Snapshot]]:
    return [(leaf, at) for leaf, at in zip(state.leaves, state.snapshots) if memory_of(leaf) == memory]


def unbuilt(state: DeferredState) -> list[Any]:
    """The tensors made of these logits, and the logits themselves, that are not computed yet."""
    members: list[Any] = [reference() for reference in state.shared.members]
    return [member for member in members if member is not None and member._plain is None]


def provide(waiting: Sequence[WaitingLogits]) -> None:
    """Give logits a copy of a weight, one for all of them, or build them."""
    if not waiting:
        return
    size = max(leaf.numel() for _, leaves in waiting for leaf, _ in leaves)
    if graph_task() == -1 and size > sum(math.prod(state.layout.shape) for state, _ in waiting):
        for state, _ in waiting:
            state.shared.built_for = str(refuse(BuiltAtOnce.LARGE_COPY))
            for member in unbuilt(state):
                plain(member)
        return
    with out_of_sight(), torch.no_grad():
        copy = waiting[0][1][0][0].untyped_storage().clone()
        for _, leaves in waiting:
            for leaf, at in leaves:
                whole = torch.empty(0, dtype=leaf.dtype, device=leaf.device)
                leaf.data = whole.set_(copy, leaf.storage_offset(), leaf.shape, leaf.stride())
                at.source, at.address = leaf, leaf.data_ptr()
