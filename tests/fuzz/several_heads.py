"""Random programs of several heads under one loss: students, teachers, divergences and metrics, in any order.

A program is a list of steps. Each makes a head of the hidden states, a loss of one or two heads that were made before
it, or something of the losses so far. This file compares nothing.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.programs.claims import D, V, hidden, labels, weight

N = 6


class Step(NamedTuple):
    kind: str  # "head", "metric", "mixed", or a name in ONE or TWO
    first: int = 0  # which head or loss it reads, counted modulo those that there are
    second: int = 0
    change: str = ""  # of the hidden states, a name in HIDDEN
    logits: str = ""  # what is done to them, a name in LOGITS
    quiet: bool = False  # under no_grad, or of a detached teacher


HIDDEN: dict[str, Callable[[Tensor], Tensor]] = {
    "": lambda h: h,
    "tanh": torch.tanh,
    "sin": torch.sin,
    "cos": torch.cos,
}
LOGITS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "": lambda z, b: z,
    "temperature": lambda z, b: z / 2.0,
    "bias": lambda z, b: z + b,
    "cap": lambda z, b: 3 * torch.tanh(z / 3),
}
ONE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": F.cross_entropy,
    "smoothed": lambda z, y: F.cross_entropy(z, y, label_smoothing=0.1),
    "entropy": lambda z, y: F.softmax(z, -1).mul(F.log_softmax(z, -1)).sum(-1).mean(),
    "z_loss": lambda z, y: z.logsumexp(-1).square().mean(),
    "gathered": lambda z, y: -z.log_softmax(-1).gather(-1, y[:, None]).mean(),
    "one_class": lambda z, y: 0.1 * z[:, 3].sum(),
    "two_classes": lambda z, y: z[:, [3, -1]].log_softmax(-1)[:, 0].mean(),
    "margin": lambda z, y: z.topk(2, -1).values.sum(-1).mean(),
    "accuracy": lambda z, y: (z.argmax(-1) == y).float().mean(),
}
TWO: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "divergence": lambda z, t: F.kl_div(
        F.log_softmax(z, -1), F.log_softmax(t, -1), reduction="batchmean", log_target=True
    ),
    "distance": lambda z, t: (z.softmax(-1) - t.softmax(-1)).square().sum(-1).mean(),
}


def draw(seed: str) -> list[Step]:
    """The program of this seed: a head, and 4 to 13 steps more."""
    rng = random.Random(seed)
    kinds = [*["head"] * 5, *["divergence"] * 3, "cross_entropy", "cross_entropy", *ONE, *TWO, "metric", "mixed"]
    steps = [Step("head")]
    for _ in range(rng.randint(4, 13)):
        change, logits = rng.choice([*HIDDEN, "fed back"]), rng.choice([*LOGITS, "", ""])
        steps.append(Step(rng.choice(kinds), rng.randrange(99), rng.randrange(99), change, logits, rng.random() < 0.35))
    return steps


def program(steps: list[Step]) -> Callable[..., tuple[Tensor, ...]]:
    """(h [N, D], w [V, D], v [V, D], b [V], y [N]) -> the sum of all losses, and the metrics."""

    def run(h: Tensor, w: Tensor, v: Tensor, b: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        heads: list[Tensor] = []
        losses: list[Tensor] = [h.square().mean()]
        metrics: list[Tensor] = []
        for step in steps:
            i = step.first % len(heads if step.kind in ONE or step.kind in TWO else losses)
            if step.kind == "head":
                x = h * losses[-1].sigmoid() if step.change == "fed back" else HIDDEN[step.change](h)
                with torch.set_grad_enabled(not step.quiet):
                    z = F.linear(x, (w, v)[step.first % 2])
                heads.append(LOGITS[step.logits](z, b))
            elif step.kind in ONE:
                loss = ONE[step.kind](heads[i], y)
                losses.append(loss * loss.detach() if step.quiet else loss)
            elif step.kind in TWO:
                t = heads[step.second % len(heads)]
                losses.append(TWO[step.kind](heads[i], t.detach() if step.quiet else t))
            elif step.kind == "metric":
                metrics.append(2 * losses[i].detach())
            else:
                other = losses[step.second % len(losses)]
                losses[i] = 0.5 * losses[i] + other * other.detach().sigmoid()
        return torch.stack(losses).sum(), *metrics

    return run


def inputs(seed: str) -> tuple[Any, ...]:
    """Of `program`; for two seeds of five the second weight is frozen."""
    v = weight(V, D)
    return (
        hidden(N, D),
        weight(V, D),
        v.requires_grad_(random.Random(f"{seed} frozen").random() < 0.6),
        weight(V),
        labels(N),
    )
