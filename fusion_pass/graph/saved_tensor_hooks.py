"""Hides what the pass computes from hooks on saved tensors.

Checkpointing and offloading count or move every tensor that autograd saves while they are active, also on the thread
of a compiler. The pass computes on fake tensors to read a graph, which is no part of the program.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from fusedhead.compat import saved_tensors_hooks_enabled, top_saved_tensors_hooks


def _with_version(tensor: Tensor) -> tuple[Tensor, int]:
    return tensor, 0 if tensor.is_inference() else tensor._version


def _unwritten(saved: tuple[Tensor, int]) -> Tensor:
    """The saved tensor. Raises RuntimeError if it was written to since: under hooks autograd does not check that."""
    tensor, before = saved
    _, now = _with_version(tensor)
    if now != before:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: "
            f"[{tensor.type()} {list(tensor.shape)}] is at version {now}; expected version {before} instead."
        )
    return tensor


@contextmanager
def unhooked() -> Iterator[None]:
    """Context in which active hooks on saved tensors see nothing: only the hooks pushed last run, which are ours."""
    # where hooks are disabled, none is active and none may be pushed
    if not saved_tensors_hooks_enabled() or top_saved_tensors_hooks(True) is None:
        yield
        return
    with saved_tensors_hooks(_with_version, _unwritten):
        yield
