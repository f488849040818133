"""Changes of a program between its steps: frozen parameters, writes to operands, steps of optimizers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tests.deferred.heads import V
from tests.deferred.machine.models import Side

# eps: a gradient that is nothing but rounding must not become a step of its own
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, eps=1e-4, foreach=True),
    "fused AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, eps=1e-4, fused=True),
}


@torch.no_grad()
def replaced(side: Side) -> None:
    side.model.lm_head.weight.data = side.model.lm_head.weight * 0.9


def written(name: str, side: Side) -> None:
    target = {"weight": side.model.lm_head.weight, "trunk": side.model.mix.weight, "scale": side.model.scale}[name]
    with torch.no_grad():
        target.mul_(0.9)


CHANGES: dict[str, Callable[[Side], Any]] = {
    "head frozen": lambda s: s.model.lm_head.requires_grad_(False) and None,
    "head unfrozen": lambda s: s.model.lm_head.requires_grad_(True) and None,
    "trunk frozen": lambda s: s.model.mix.requires_grad_(False) and None,
    "all unfrozen": lambda s: s.model.requires_grad_(True) and None,
    "weight written": lambda s: written("weight", s),
    "weight replaced": lambda s: replaced(s),
    "weight written through .data": lambda s: s.model.lm_head.weight.data.mul_(0.9) is None,
    "trunk written": lambda s: written("trunk", s),
    "scale written": lambda s: written("scale", s),
    "labels written": lambda s: s.labels.add_(1).remainder_(V) is None,
    "tokens written": lambda s: s.tokens.add_(1).remainder_(V) is None,
    "gradients cleared": lambda s: s.model.zero_grad(),
    **{f"{name} steps": lambda s, name=name: s.optimizers[name].step() and None for name in OPTIMIZERS},
}
