"""The two programs that are compared: a model, and a copy of it that returns deferred logits."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from tests.deferred.heads import D, V, deferring

B, T = 11, 6  # enough tokens for logits without gradients to be deferred


class Net(nn.Module):
    """[B, T] tokens to logits in one of some forms, with a learned scale that a caller may use."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.embed = nn.Embedding(V, D)
        self.mix = nn.Linear(D, D)
        self.lm_head = nn.Linear(D, V, bias=form == "bias")
        if form == "tied":
            self.lm_head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.ones(()))
        self.shift = nn.Parameter(torch.zeros(V))

    def forward(self, x: Tensor) -> Any:
        h = torch.tanh(self.mix(self.embed(x)))
        z = self.lm_head(h)
        if self.form == "capped":
            return 5 * torch.tanh(z / 5)
        if self.form == "two":
            with torch.no_grad():
                half = z / 2
            return z, half
        return (h, z) if self.form == "with hidden states" else z


FORMS = ("plain", "bias", "tied", "capped", "two", "with hidden states")


@dataclass(eq=False)
class Side:
    """One of the two programs."""

    model: Net
    forward: Callable[[Tensor], Any]
    tokens: Tensor
    labels: Tensor
    optimizers: dict[str, torch.optim.Optimizer] = field(default_factory=dict)


@dataclass(eq=False)
class Pair:
    """A tensor of the real program and its counterpart of the deferred one."""

    real: Tensor
    other: Tensor
    made_of: frozenset[int] = frozenset()  # forwards that it comes from
    coarse: bool = False  # whether some of it was computed in half precision


@cache
def compiled(form: str) -> tuple[Net, Net, dict[str, Tensor], Any]:
    """The models of a form, what they start from, and the second one compiled: once a process."""
    torch.manual_seed(0)
    real = Net(form)
    other = copy.deepcopy(real)
    return real, other, {k: v.clone() for k, v in real.state_dict().items()}, deferring(other)
