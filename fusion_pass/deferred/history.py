"""The autograd history of deferred logits: nodes for the calls that lead to them, and for writes.

Autograd reads the history of a tensor in C++, where Python cannot intervene, so that each deferred tensor has its own
nodes. Their backward runs the recorded call again on the saved tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusedhead.deferred.call_program import Mode, modes
from fusedhead.deferred.state import DeferredState
from fusedhead.deferred.surroundings import out_of_sight
from fusedhead.deferred.tensor import DeferredLogits, accept_grad_fn, as_plain, is_function_result


class AttachGradFn(torch.autograd.Function):
    """Gives deferred logits a ``grad_fn``, for code that walks autograd's graph or uses the tensor in C++."""

    @staticmethod
    def forward(ctx: Any, state: DeferredState, *inputs: Tensor) -> Any:
        ctx.recorded, ctx.part, ctx.gathering = state.recorded, state.part, state.shared.gathering
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)  # no gradient is not a gradient of zeros
        return DeferredLogits(state)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple:
        return (None, *call_gradients(ctx, grad, ctx.needs_input_grad[1:]))


def call_gradients(ctx: Any, grad: Tensor | None, needs: Sequence[bool]) -> list[Tensor | None]:
    """The gradients of a recorded call's tensors, for an autograd node that stands for the call."""
    if grad is None:
        return [None for _ in needs]
    recorded = ctx.recorded
    for hook in ctx.gathering:
        hook(grad)
    inputs, grad = list(map(as_plain, ctx.saved_tensors)), as_plain(grad)
    needed = [at for at, need in enumerate(needs) if need]
    leaves = [t.detach().requires_grad_() if at in needed else t for at, t in enumerate(inputs)]
    with modes(recorded.mode, grad.device.type), torch.enable_grad():
        result = recorded.on(leaves)
        result = result if ctx.part is None else result[ctx.part]
        grads = torch.autograd.grad(result, [leaves[at] for at in needed], grad, allow_unused=True)
    gradients = dict(zip(needed, grads))
    return [gradients.get(at) for at in range(len(inputs))]


def with_grad_fn(state: DeferredState) -> DeferredLogits:
    """Deferred logits with a ``grad_fn``, if they have a gradient."""
    if not state.layout.grad:
        return DeferredLogits(state)
    tensor = AttachGradFn.apply(state, *state.recorded.tensors)
    accept_grad_fn(tensor)
    return tensor


class RebindInPlace(torch.autograd.Function):
    """Rebinds deferred logits to another state, which is what a write in place does to a tensor."""

    @staticmethod
    def forward(ctx: Any, state: DeferredState, tensor: DeferredLogits, *inputs: Tensor) -> Any:
        ctx.recorded, ctx.part, ctx.gathering = state.recorded, state.part, state.shared.gathering
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)  # no gradient is not a gradient of zeros
        ctx.mark_dirty(tensor)
        tensor._deferred = state
        return tensor

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple:
        return (None, None, *call_gradients(ctx, grad, ctx.needs_input_grad[2:]))


class CopyHistory(torch.autograd.Function):
    """Gives deferred logits the history of their plain tensor, since C++ reads the history of the deferred one."""

    @staticmethod
    def forward(ctx: Any, tensor: DeferredLogits, numbers: Tensor) -> Any:
        ctx.mark_dirty(tensor)
        ctx.set_materialize_grads(False)
        return tensor

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple:
        return None, grad


class InvalidateHistory(torch.autograd.Function):
    """Makes a backward raise: the history of a view that torch refuses to differentiate, since its base was written."""

    @staticmethod
    def forward(ctx: Any, tensor: DeferredLogits, error: RuntimeError) -> Any:
        ctx.mark_dirty(tensor)
        ctx.error = str(error)
        return tensor

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> tuple:
        raise RuntimeError(ctx.error)


def invalidate_history(tensor: DeferredLogits, error: RuntimeError) -> None:
    """Make a backward through ``tensor`` raise: C++ would not notice that its plain tensor's history is invalid."""
    if tensor._accepted_grad_fn is None or is_function_result(tensor):
        return
    with out_of_sight(), modes(Mode(True, None), tensor.device.type):
        InvalidateHistory.apply(tensor, error)
    accept_grad_fn(tensor)


def update_history(tensor: DeferredLogits) -> None:
    """Copy the history of the plain tensor after a write to it, or to its history."""
    numbers = tensor._plain
    if numbers is None or numbers.is_inference() or is_function_result(tensor):
        return
    if numbers._base is not None and not torch.is_grad_enabled():
        return  # torch refuses the history of such a view from here on, when somebody asks for it
    with out_of_sight(), modes(Mode(True, None), numbers.device.type):
        if numbers.requires_grad:
            CopyHistory.apply(tensor, numbers)
        elif tensor._accepted_grad_fn is not None:
            tensor.detach_()
    accept_grad_fn(tensor)
