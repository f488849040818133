"""What is asked of a head: the four tasks, the program a user writes for each, and one step of it.

The programs are ordinary PyTorch; nothing here knows who compiles them. A task's *floor* is the time of its
bare matrix products, which no way of computing it can avoid.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.data import Batch

Program = Callable[[Tensor, Tensor, Tensor], Tensor]  # (h [N, D], w [V, D], y [N]) -> loss [] or log-probs [N]


class Task(NamedTuple):
    name: str
    gemms: int  # products of 2 N D V floating-point operations that it needs
    grads: tuple[str, ...]  # operands whose gradient is asked
    per_token: bool  # log-probabilities [N] and any upstream gradient, instead of the mean loss
    about: str


TASKS = {
    t.name: t
    for t in (
        Task("forward", 1, (), False, "the loss alone, no gradients"),
        Task("train", 3, ("h", "w"), False, "mean cross-entropy, dH and dW"),
        Task("frozen", 2, ("h",), False, "mean cross-entropy, dH; W needs no gradient"),
        Task("per-token", 4, ("h", "w"), True, "log-probability of each label, dH and dW for any upstream"),
    )
}


def loss_of(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy in float32, as training loops write it."""
    return F.cross_entropy(F.linear(h, w).float(), y)


def logprobs_of(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    """Log-probability of each label [N] float32, as policy-gradient code writes it; every label exists."""
    return F.linear(h, w).float().log_softmax(-1).gather(-1, y.unsqueeze(-1)).squeeze(-1)


def program_of(task: Task) -> Program:
    return logprobs_of if task.per_token else loss_of


def labels_of(task: Task, batch: Batch) -> Tensor:
    """The task's labels [N]: a log-probability is asked of every token, so ignored labels become token 0."""
    return batch.y.clamp(min=0) if task.per_token else batch.y


def step_of(task: Task, program: Program, batch: Batch) -> Callable[[], tuple[Tensor, ...]]:
    """One step of the head as a function of nothing: (loss or log-probs, then the gradients asked)."""
    h = batch.h.detach().requires_grad_("h" in task.grads)
    w = batch.w.detach().requires_grad_("w" in task.grads)
    y = labels_of(task, batch)
    asked = tuple(operand for operand in (h, w) if operand.requires_grad)

    def step() -> tuple[Tensor, ...]:
        if not asked:
            with torch.no_grad():
                return (program(h, w, y),)
        value = program(h, w, y)
        upstream = batch.upstream if task.per_token else None
        return value.detach(), *torch.autograd.grad(value, asked, upstream)

    return step


def floor_step(task: Task, batch: Batch) -> Callable[[], tuple[Tensor, ...]]:
    """The task's bare products: h Wᵀ (again where it is recomputed), dz W and dzᵀ h, h Wᵀ standing for dz."""
    h, w = batch.h, batch.w

    def step() -> tuple[Tensor, ...]:
        z = h @ w.t()
        if task.gemms == 4:
            del z
            z = h @ w.t()
        if "h" in task.grads:
            torch.mm(z, w)
        if "w" in task.grads:
            torch.mm(z.t(), h)
        return ()

    return step
