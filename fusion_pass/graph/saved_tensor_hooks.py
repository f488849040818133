"""Hides what the pass computes from hooks on saved tensors.

Checkpointing and offloading count or move every tensor that autograd saves while they are active, also on the thread
of a compiler. The pass computes on fake tensors to read a graph, which is no part of the program.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from fusedhead.compat import saved_tensors_hooks_enabled


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


@contextmanager
def unhooked() -> Iterator[None]:
    """Inside, hooks on saved tensors that are active see nothing: those pushed last are the only ones that run."""
    # where they are forbidden, none is active, and none may be pushed
    if not saved_tensors_hooks_enabled():
        yield
        return
    with saved_tensors_hooks(_as_it_is, _as_it_is):
        yield
