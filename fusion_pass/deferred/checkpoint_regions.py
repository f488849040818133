"""Regions of activation checkpointing, and the gradients of logits that one has returned.

Eager code's backward runs such a region again and takes what the second pass saves. The ``grad_fn`` that deferred
logits get in the region saves their sources there too, so a gradient that goes through it is of the second pass too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusedhead.deferred.state import DeferredState
from fusedhead.deferred.surroundings import checkpoint


def is_returned(state: DeferredState) -> bool:
    """Whether the tensor is one that a graph returned, and no result of a call on such a one."""
    return state.graph_output is not None and state.recorded.func is state.graph_output.recipe.program


def is_recomputed(state: DeferredState, result: Tensor) -> bool:
    """Whether the gradient of ``result``, the plain tensor, has to go through the deferred one's ``grad_fn``.

    What computes ``result`` saves nothing in the region. A view needs nothing saved, and has the history of its base.
    """
    if state.shared.checkpoint is None or not (state.layout.grad and result.requires_grad):
        return False
    return is_returned(state) or not result._is_view()


def has_left(state: DeferredState) -> bool:
    """Whether a differentiable tensor is used outside of the region that returned its logits.

    No fused op may answer there: it computes gradients of the first pass, or saves what they need of it.
    """
    shared = state.shared
    if shared.checkpoint is None or not (torch.is_grad_enabled() and state.layout.grad):
        return False
    return not shared.returned_in(checkpoint())
