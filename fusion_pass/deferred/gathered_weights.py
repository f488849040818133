"""Weights that FSDP2 frees while deferred logits are made of them: what stands for them from then on.

FSDP2 gathers a unit's weights before its forward, and gives their memory back after it, at the end of a backward, or
when asked to (``reshard()``, ``state_dict()``). Deferred logits are made of the gathered memory itself for as long as
it is there, which is free. What happens when it goes:

| who still waits for it                                     | what stands for the weight                           |
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
from collections.abc import Iterator, Sequence
from functools import wraps
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from fusedhead.compat import graph_task
from fusedhead.deferred.reasons import BuiltAtOnce
from fusedhead.deferred.state import Knowledge, State
from fusedhead.deferred.surroundings import out_of_sight
from fusedhead.deferred.tensor import plain
from fusedhead.graph.reasons import refuse
from fusedhead.legality.sharding import FREES

log = logging.getLogger("fusedhead")
NO_ADDRESS = 0  # the address of what has been freed: no tensor is there again
PURGE = 64  # memories with an entry, before those that nobody waits for are dropped

_guard = threading.Lock()
_waiting: dict[int, Any] = {}  # what is made of one memory, by its storage: a weakref.WeakSet of `Knowledge`
_wrapped: list[Any] = []  # torch's class, when its method is ours


def sees_frees() -> bool:
    """Whether it is seen when FSDP2 frees a weight, from now on."""
    if _wrapped:
        return True
    with _guard:
        if not _wrapped:
            module, name, method = FREES
            cls = getattr(import_module(module), name, None)
            original = getattr(cls, method, None)
            if original is None:
                log.warning("fusedhead: this torch has no %s.%s.%s: weights under FSDP2 are copied", *FREES)
                return False

            @wraps(original)
            def free(self: Any, *args: Any, **kwargs: Any) -> Any:
                if _waiting:
                    before_free([*self.all_gather_outputs, *getattr(self, "_unsharded_inner_tensors", ())])
                return original(self, *args, **kwargs)

            setattr(cls, method, free)
            _wrapped.append(cls)
    return True


def is_watched(operand: Tensor) -> bool:
    """Whether what frees an operand is seen: its memory is its own storage."""
    return type(operand) in (Tensor, nn.Parameter) and operand.layout is torch.strided


def wait_for(knowledge: Knowledge) -> None:
    """Remember deferred logits until they are gone: a weight that they are made of may be freed."""
    with _guard:
        if len(_waiting) > PURGE:
            for memory in [memory for memory, waiting in _waiting.items() if not waiting]:
                del _waiting[memory]
        for leaf in knowledge.leaves:
            _waiting.setdefault(memory_of(leaf), weakref.WeakSet()).add(knowledge)


def memory_of(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def before_free(gathered: Sequence[Tensor]) -> None:
    """Let what waits for memory that is freed next have what it needs. Never fails FSDP2's own work."""
    for memory in map(memory_of, gathered):
        with _guard:
            waiting = list(_waiting.pop(memory, ()))
        copy: list[Tensor] = []
        for knowledge in waiting:
            mine = [(leaf, at) for leaf, at in zip(knowledge.leaves, knowledge.states) if memory_of(leaf) == memory]
            try:
                if mine and next(unbuilt(knowledge), None) is not None:
                    keep(knowledge, mine, copy)
            except Exception:
                log.warning("fusedhead: a weight that deferred logits are made of is freed", exc_info=True)
            for leaf, at in mine:
                if memory_of(leaf) == memory:
                    at.address = NO_ADDRESS


def unbuilt(knowledge: Knowledge) -> Iterator[Tensor]:
    """What is made of logits, themselves included, that has no numbers yet."""
    for reference in knowledge.family.members:
        member: Any = reference()
        if member is not None and member._plain is None:
            yield member


def keep(knowledge: Knowledge, mine: Sequence[tuple[Tensor, State]], copy: list[Tensor]) -> None:
    """Give logits their own copy of a weight, one for all (``copy``), or build them."""
    if graph_task() == -1 and not all(leaf.numel() <= math.prod(knowledge.layout.shape) for leaf, _ in mine):
        knowledge.family.built_for = str(refuse(BuiltAtOnce.LARGE_COPY))
        for member in unbuilt(knowledge):
            plain(member)  # type: ignore[arg-type]
        return
    with out_of_sight(), torch.no_grad():
        for leaf, at in mine:
            if not copy:
                # the same bytes, so that every leaf finds its own part of them
                copy.append(torch.empty(0, dtype=torch.uint8, device=leaf.device).set_(leaf.untyped_storage().clone()))
            whole = torch.empty(0, dtype=leaf.dtype, device=leaf.device)
            whole.set_(copy[0].untyped_storage(), leaf.storage_offset(), leaf.shape, leaf.stride())
            leaf.data = whole
            at.source, at.address = leaf, leaf.data_ptr()
