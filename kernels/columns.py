"""What a program does to the logits element by element, as data: the `Transform` of a head.

A transform is a short chain of steps applied in order to z = h @ w.T. It travels through op schemas as text,
for example ``"addcol:0 mul:0.0333 tanh mul:30.0"``. Everything is computed in float32 whatever the program's
dtype (closer to the truth); a ``round`` step keeps the place where the program rounds, and only decisions
(max, argmax) honour it. This file holds the chain, its text form and its meaning in torch ops; it must not
know about windows, engines or graphs.

| step          | z becomes                     | derivative            |
|---------------|-------------------------------|-----------------------|
| ``mul:c``     | z · c                         | c                     |
| ``add:c``     | z + c                         | 1                     |
| ``tanh``      | tanh z                        | 1 - tanh² z           |
| ``sigmoid``   | σ(z)                          | σ(z)(1 - σ(z))        |
| ``addcol:k``  | z + cols[k][v]                | 1                     |
| ``mulcol:k``  | z · cols[k][v]                | cols[k][v]            |
| ``addrow:k``  | z + rows[k][i]                | 1                     |
| ``mulrow:k``  | z · rows[k][i]                | rows[k][i]            |
| ``setcol:k``  | cols[k][v], or z where it is NaN | 0, or 1          |
| ``round:t``   | z (decisions: z rounded to t) | 1                     |
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

WITH_CONSTANT = ("mul", "add")
WITH_VECTOR = ("addcol", "mulcol", "setcol", "addrow", "mulrow")
UNARY = ("tanh", "sigmoid")


class Step(NamedTuple):
    op: str
    value: float | int | str = 0  # the constant, the index of the vector, or the dtype's name


class Transform(NamedTuple):
    steps: tuple[Step, ...] = ()

    @property
    def text(self) -> str:
        """The form that `parse` reads back exactly (``repr`` of a float round-trips)."""
        return " ".join(s.op if s.op in UNARY else f"{s.op}:{s.value!r}".replace("'", "") for s in self.steps)

    @property
    def smooth(self) -> Transform:
        """The chain without its rounding steps: what every statistic but max and argmax sees."""
        return Transform(tuple(s for s in self.steps if s.op != "round"))

    @property
    def bounded_slope(self) -> bool:
        """Whether a step squashes z (tanh, sigmoid), so that the derivative varies along a row."""
        return any(s.op in UNARY for s in self.steps)


@lru_cache(maxsize=256)
def parse(text: str) -> Transform:
    """Read a transform's text.

    Raises ValueError naming the step that is not one of the table above.
    """
    steps = []
    for word in text.split():
        op, _, value = word.partition(":")
        if op in UNARY:
            steps.append(Step(op))
        elif op in WITH_CONSTANT:
            steps.append(Step(op, float(value)))
        elif op in WITH_VECTOR:
            steps.append(Step(op, int(value)))
        elif op == "round":
            steps.append(Step(op, value))
        else:
            known = ", ".join((*WITH_CONSTANT, *WITH_VECTOR, *UNARY, "round"))
            raise ValueError(f"transform step {word!r} is not known; expected one of {known}")
    return Transform(tuple(steps))


def apply(transform: Transform, z: Tensor, cols: Tensor, rows: Tensor, *, decide: bool = False) -> Tensor:
    """The transformed logits, out of place.

    z [n, v] floating; cols [C, v] and rows [R, n] are the slices that belong to this window. With ``decide``
    the rounding steps take effect.
    """
    value: Any
    for op, value in transform.steps:
        if op == "mul":
            z = z * value
        elif op == "add":
            z = z + value
        elif op == "tanh":
            z = torch.tanh(z)
        elif op == "sigmoid":
            z = torch.sigmoid(z)
        elif op == "addcol":
            z = z + cols[value]
        elif op == "mulcol":
            z = z * cols[value]
        elif op == "setcol":
            z = torch.where(cols[value].isnan(), z, cols[value])
        elif op == "addrow":
            z = z + rows[value][:, None]
        elif op == "mulrow":
            z = z * rows[value][:, None]
        elif op == "round" and decide:
            z = z.to(getattr(torch, str(value))).to(z.dtype)
    return z
