"""Programs that become token programs, and the ops of the package that a rewritten program calls."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.eager_stack import Rewritten
from tests.programs.claims import V, right

Program = Callable[..., object]


def distillation(h: Tensor, w: Tensor, ht: Tensor, wt: Tensor) -> Tensor:
    with torch.no_grad():
        teacher = F.linear(ht, wt)
    student = F.log_softmax(F.linear(h, w) / 2, -1)
    return F.kl_div(student, F.softmax(teacher / 2, -1), reduction="batchmean") * 4


def reverse_kl(h: Tensor, w: Tensor, ht: Tensor, wt: Tensor) -> Tensor:
    student, teacher = F.linear(h, w), F.linear(ht, wt).detach()
    return (student.softmax(-1) * (student.log_softmax(-1) - teacher.log_softmax(-1))).sum(-1).mean()


def top_k_accuracy(h: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    z = F.linear(h, w).view(-1, V)
    best = z.detach().topk(3, -1).indices
    return F.cross_entropy(z, y.view(-1)), (best == y.view(-1, 1)).any(-1).float().mean()


def calls(program: Program, *inputs: Tensor, fused: int = 1) -> list[str]:
    """The ops of the package that a rewritten program calls, after it came out right."""
    right(program, *inputs, fused=fused)
    rewritten = Rewritten(program)
    rewritten(*inputs)
    return re.findall(r"fusedhead\.(\w+)", rewritten.report.after)
