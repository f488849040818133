"""The `Transform` of a head: the user's elementwise ops between the projection and the softmax, as data.

A transform is a short chain of steps, applied in order to z = h @ w.T. As an argument of the fused ops it is text, for
example ``"addcol:0 mul:0.0333 tanh mul:30.0"``. Engines compute it in float32 whatever the program's dtype, which is
closer to the exact result. A ``round`` step marks where the program rounds; only max and argmax, which must decide as
eager code does, apply it.

`STEPS` defines each kind of step in torch ops: its value, its derivative, and what the derivative reads. The torch side
reads only this table, so that a new kind is one entry. Triton's side unrolls the steps at compile time
(`triton_engine.device.transform`).

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
| ``fn:code``   | any function, generated from the program's op (`transform.pointwise`) | generated with it |
| ``round:t``   | z (decisions: z rounded to t) | 1                     |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedhead.kernels.transform import native, pointwise


class StepKind(NamedTuple):
    """One kind of step in torch ops. ``x`` is the step's operand (`Step.operand`), z and g are windows [n, v]."""

    apply: Callable[[Tensor, Any, Tensor | None], Tensor]  # (z, x, out) -> z after the step; out None: a new tensor
    pull: Callable[[Tensor, Any, Tensor | None], Tensor]  # (g, x, kept) -> g times the derivative, in place of g
    read: Callable[[str], float | int | str] | None = None  # parses the step's value; None: the step has no value
    axis: str = ""  # "c": the value is the index of a column vector (along V), "r": of a row vector (along N)
    keeps: str = ""  # what the derivative reads: the step's "input", its "output", or "" if it does not depend on z
    vector: str = ""  # the derivative with respect to the vector: "one", the "input", or "" for no gradient
    varies: bool = False  # True if the derivative differs from class to class
    scale: Callable[[Any], float] | None = None  # value -> c, for a step that is z · c
    steepest: Callable[[Any], float | None] = lambda value: 1.0  # value -> a bound of |derivative|, None: no bound
    masks: bool = False  # True if the step sets columns to -inf
    decides: bool = False  # True if only max and argmax apply the step


class Generated(NamedTuple):
    """The operand of a step ``fn``: a generated function and the vectors that it may read."""

    function: pointwise.Function
    cols: Tensor
    rows: Tensor

    def value(self, z: Tensor) -> Tensor:
        """The function of z. The result may be z itself or a view of it."""
        return native.value(self.function, z, self.cols, self.rows)

    def gradient(self, g: Tensor, z: Tensor | None) -> Tensor:
        assert z is not None
        return native.gradient(self.function, g, z, self.cols, self.rows)


def _one(g: Tensor, x: Any, kept: Tensor | None) -> Tensor:
    return g


def _times(g: Tensor, x: Any, kept: Tensor | None) -> Tensor:
    return g.mul_(x)


def _pull_tanh(g: Tensor, x: Any, kept: Tensor | None) -> Tensor:
    assert kept is not None
    return g.mul_(kept.mul_(kept).neg_().add_(1))  # 1 - t²


def _pull_sigmoid(g: Tensor, x: Any, kept: Tensor | None) -> Tensor:
    assert kept is not None
    return g.mul_(kept.addcmul_(kept, kept, value=-1))  # s - s²


def _drop(z: Tensor, x: Tensor, out: Tensor | None) -> Tensor:
    return (z.masked_fill if out is None else out.masked_fill_)(x != 0, -math.inf)


def _rounded(z: Tensor, x: torch.dtype, out: Tensor | None) -> Tensor:
    return z.to(x).to(z.dtype)


def _add(z: Tensor, x: Any, out: Tensor | None) -> Tensor:
    return torch.add(z, x, out=out)


def _multiply(z: Tensor, x: Any, out: Tensor | None) -> Tensor:
    return torch.mul(z, x, out=out)


def _no_bound(value: Any) -> None:
    return None


STEPS: Mapping[str, StepKind] = {
    "mul": StepKind(_multiply, _times, float, scale=float, steepest=lambda value: abs(float(value))),
    "add": StepKind(_add, _one, float),
    "addcol": StepKind(_add, _one, int, "c", vector="one"),
    "mulcol": StepKind(_multiply, _times, int, "c", vector="input", varies=True, steepest=_no_bound),
    "setcol": StepKind(
        lambda z, x, out: torch.where(x.isnan(), z, x, out=out),
        lambda g, x, kept: g.masked_fill_(x.isnan().logical_not_(), 0),
        int, "c", varies=True,
    ),
    # its derivative varies as well, but exp(-inf) is 0 without it; masked labels are handled in `single_pass`
    "dropcol": StepKind(_drop, lambda g, x, kept: g.masked_fill_(x != 0, 0), int, "c", masks=True),
    "addrow": StepKind(_add, _one, int, "r", vector="one"),
    "mulrow": StepKind(_multiply, _times, int, "r", vector="input", steepest=_no_bound),
    "tanh": StepKind(lambda z, x, out: torch.tanh(z, out=out), _pull_tanh, keeps="output", varies=True),
    "sigmoid": StepKind(
        lambda z, x, out: torch.sigmoid(z, out=out), _pull_sigmoid, keeps="output", varies=True,
        steepest=lambda value: 0.25,
    ),
    "fn": StepKind(
        lambda z, x, out: x.value(z),
        lambda g, x, kept: g.copy_(x.gradient(g, kept)),
        lambda text: pointwise.parse_function(text).text, keeps="input", varies=True, steepest=_no_bound,
    ),
    "round": StepKind(_rounded, _one, str, scale=lambda value: 1.0, decides=True),
}  # fmt: skip


class Step(NamedTuple):
    op: str
    value: float | int | str = 0  # a constant, the index of a vector, a dtype's name, or the text of a function

    @property
    def kind(self) -> StepKind:
        return STEPS[self.op]

    @property
    def vectors(self) -> Iterator[tuple[str, int]]:
        """("c" or "r", index) of each column or row vector that the step reads."""
        if self.kind.axis:
            yield self.kind.axis, int(self.value)
        elif self.op == "fn":
            yield from pointwise.vectors(str(self.value))

    def operand(self, cols: Tensor, rows: Tensor) -> Any:
        """What the step reads besides z in one window: a number, a vector, a dtype or a `Generated`.

        cols [C, v] and rows [R, n] are the window's slices.
        """
        axis = self.kind.axis
        if axis:
            return cols[int(self.value)] if axis == "c" else rows[int(self.value)][:, None]
        if self.op == "fn":
            return Generated(pointwise.parse_function(str(self.value)), cols, rows)
        return getattr(torch, self.value) if isinstance(self.value, str) else self.value

    def keeps(self, need_cols: bool, need_rows: bool) -> str:
        """The tensor that the backward pass keeps of this step: its "input", its "output", or "" for none."""
        kind = self.kind
        of_vector = kind.vector == "input" and (need_cols if kind.axis == "c" else need_rows)
        return kind.keeps or ("input" if of_vector else "")

    def with_column_offset(self, columns: int) -> Step:
        """The step with ``columns`` added to the index of its column vectors."""
        if self.op == "fn":
            return self._replace(value=pointwise.shifted(str(self.value), columns))
        return self._replace(value=int(self.value) + columns) if self.kind.axis == "c" else self


class Transform(NamedTuple):
    steps: tuple[Step, ...] = ()

    @property
    def text(self) -> str:
        """The transform as text, which `parse` reads back exactly (``repr`` of a float round-trips)."""
        return " ".join(s.op if s.kind.read is None else f"{s.op}:{s.value!r}".replace("'", "") for s in self.steps)

    @property
    def smooth(self) -> Transform:
        """The chain without its rounding steps, which only max and argmax apply."""
        return Transform(tuple(s for s in self.steps if not s.kind.decides))

    @property
    def functions(self) -> tuple[pointwise.Function, ...]:
        """The generated functions among the steps."""
        return tuple(pointwise.parse_function(str(s.value)) for s in self.steps if s.op == "fn")

    @property
    def factorises(self) -> bool:
        """True if the derivative at (token, class) is a(token) · b(class), whatever z is."""
        return not any(s.kind.keeps for s in self.steps)

    @property
    def varies_along_row(self) -> bool:
        """True if the derivative differs from class to class, so that one factor a row cannot stand for it."""
        return any(s.kind.varies for s in self.steps)

    @property
    def plain_scale(self) -> float | None:
        """c if the transform is z · c, rounding steps aside; else None."""
        scale = 1.0
        for step in self.steps:
            factor = step.kind.scale
            if factor is None:
                return None
            scale *= factor(step.value)
        return scale

    @property
    def steepest(self) -> float | None:
        """A bound of |∂z/∂(h wᵀ)| over all z and all vectors; None if there is no such bound."""
        bound = 1.0
        for step in self.steps:
            most = step.kind.steepest(step.value)
            if most is None:
                return None
            bound *= most
        return bound

    def bias_slopes(self, count: int) -> list[float] | None:
        """For each of ``count`` column vectors the constant ratio (∂z/∂cols[k]) / (∂z/∂(h wᵀ)).

        None if a ratio is not constant: it is where column vectors are only added, among constant factors.
        """
        slopes, before = [0.0] * count, 1.0
        for step in self.steps:
            kind = step.kind
            if kind.axis == "c" and kind.vector == "one":
                slopes[int(step.value)] += 1 / before
            elif kind.axis or kind.keeps:
                return None
            elif kind.scale is not None:
                before *= kind.scale(step.value)
                if before == 0:
                    return None
        return slopes

    def sum_terms(self, c: Tensor, u: Tensor, cols: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(r [N], f [V]) with d(Σ_i c_i Σ_v u_v z_iv)/d(h wᵀ) = r ⊗ f. The transform must be one that `factorises`.

        c [N], u [V], cols [C, V], rows [R, N], all of one floating dtype.
        """
        if not self.steps:
            return c, u
        along_tokens, along_classes = c[:, None].clone(), u.clone()
        for step in self.steps:
            g = along_classes if step.kind.axis == "c" else along_tokens
            step.kind.pull(g, step.operand(cols, rows), None)
        return along_tokens[:, 0], along_classes

    def masked_columns(self, cols: Tensor) -> Tensor | None:
        """[V] bool: the columns that a step sets to -inf, whose gradient is 0; None if there is no such step."""
        masks = [cols[int(s.value)] != 0 for s in self.steps if s.kind.masks]
        return torch.stack(masks).any(0) if masks else None


@lru_cache(maxsize=256)
def parse(text: str) -> Transform:
    """Parse a transform's text. Raises ValueError with the step that `STEPS` does not have."""
    steps = []
    for word in text.split():
        op, _, value = word.partition(":")
        kind = STEPS.get(op)
        if kind is None:
            raise ValueError(f"transform step {word!r} is not known; expected one of {', '.join(STEPS)}")
        steps.append(Step(op) if kind.read is None else Step(op, kind.read(value)))
    return Transform(tuple(steps))


def apply(transform: Transform, z: Tensor, cols: Tensor, rows: Tensor, *, decide: bool = False) -> Tensor:
    """The transformed logits [n, v], as a new tensor.

    z [n, v] floating; cols [C, v] and rows [R, n] are the slices of this window. ``decide``: apply the rounding steps.
    """
    for step in transform.steps:
        if decide or not step.kind.decides:
            z = step.kind.apply(z, step.operand(cols, rows), None)
    return z
