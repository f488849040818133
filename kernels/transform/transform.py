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
| ``dropcol:k`` | -inf where cols[k][v] is not 0, or z | 0, or 1      |
| ``fn:code``   | any function, generated from the program's op (`kernels.pointwise`) | generated with it |
| ``round:t``   | z (decisions: z rounded to t) | 1                     |
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedhead.kernels.transform import native, pointwise

WITH_CONSTANT = ("mul", "add")
WITH_VECTOR = ("addcol", "mulcol", "setcol", "dropcol", "addrow", "mulrow")
UNARY = ("tanh", "sigmoid")
CURVED = (*UNARY, "fn")  # steps whose derivative depends on z


class Step(NamedTuple):
    op: str
    value: float | int | str = 0  # the constant, the index of the vector, the dtype's name, or the code

    @property
    def vectors(self) -> Iterator[tuple[str, int]]:
        """("c" or "r", index) of each vector along the vocabulary or the tokens that the step reads."""
        if self.op in WITH_VECTOR:
            yield ("c" if self.op.endswith("col") else "r"), int(self.value)
        elif self.op == "fn":
            yield from pointwise.vectors(str(self.value))

    def behind(self, columns: int) -> Step:
        """The same step where its column vectors stand behind ``columns`` others."""
        if self.op == "fn":
            return self._replace(value=pointwise.shifted(str(self.value), columns))
        named = self.op in WITH_VECTOR and self.op.endswith("col")
        return self._replace(value=int(self.value) + columns) if named else self


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
    def factorises(self) -> bool:
        """Whether the derivative is a number a token times a number a class, whatever z is."""
        return not any(s.op in CURVED for s in self.steps)


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
        elif op == "fn":
            steps.append(Step(op, pointwise.parse(value).text))
        elif op == "round":
            steps.append(Step(op, value))
        else:
            known = ", ".join((*WITH_CONSTANT, *WITH_VECTOR, *UNARY, "fn", "round"))
            raise ValueError(f"transform step {word!r} is not known; expected one of {known}")
    return Transform(tuple(steps))


def plain_scale(transform: Transform) -> float | None:
    """c where the transform is z · c up to rounding steps, None where it is more than that."""
    scale = 1.0
    for op, value in transform.steps:
        if op == "mul":
            scale *= float(value)
        elif op != "round":
            return None
    return scale


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
        elif op == "dropcol":
            z = z.masked_fill(cols[value] != 0, -math.inf)
        elif op == "addrow":
            z = z + rows[value][:, None]
        elif op == "mulrow":
            z = z * rows[value][:, None]
        elif op == "fn":
            z = native.value(pointwise.parse(value), z, cols, rows)
        elif op == "round" and decide:
            z = z.to(getattr(torch, str(value))).to(z.dtype)
    return z


def dropped(transform: Transform, cols: Tensor) -> Tensor | None:
    """[V] bool: the columns that steps set to -inf, through which nothing flows back; None without such a step."""
    found = [cols[int(value)] != 0 for op, value in transform.steps if op == "dropcol"]
    return torch.stack(found).any(0) if found else None
