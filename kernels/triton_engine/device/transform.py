"""The `Transform` of a head inside a kernel: its steps and their derivatives, unrolled at compile time.

The chain is a flat constexpr tuple (`steps_of`), so that it becomes straight-line code in the epilogue and an empty
chain costs nothing. All functions apply to a float32 value ``z``: a tile [BM, BN] of the tokens ``row`` [BM] and the
columns ``col`` [BN], or a vector whose i-th element belongs to row[i] and col[i]. ``vectors`` is a `Vectors`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusedhead.kernels.transform.transform import Transform
from fusedhead.kernels.triton_engine.constants import LOG2E, TWO_LOG2E
from fusedhead.kernels.triton_engine.device.functions import sigmoid, tanh
from fusedhead.kernels.triton_engine.device.pointwise import pointwise
from fusedhead.kernels.triton_engine.device.vectors import along_columns, along_rows


def steps_of(transform: Transform) -> tuple[float | int | str, ...]:
    """The chain as one flat tuple (op, value, op, value, ...), which a kernel takes as a constexpr."""
    return tuple(x for op, value in transform.steps for x in (str(op), value))


@triton.jit
def _stepped(z, vectors, col, row, STEPS: tl.constexpr, J: tl.constexpr, DECIDE: tl.constexpr, PRECISE: tl.constexpr):
    """z after step J. Rounding steps apply only with DECIDE."""
    op: tl.constexpr = STEPS[2 * J]
    value: tl.constexpr = STEPS[2 * J + 1]
    if op == "mul":
        z = z * value
    elif op == "add":
        z = z + value
    elif op == "tanh":
        z = tanh(z, PRECISE)
    elif op == "sigmoid":
        z = sigmoid(z)
    elif op == "addcol":
        z = z + along_columns(z, vectors, value, col)
    elif op == "mulcol":
        z = z * along_columns(z, vectors, value, col)
    elif op == "setcol":
        replacement = along_columns(z, vectors, value, col)
        z = tl.where(replacement != replacement, z, replacement)
    elif op == "dropcol":
        z = tl.where(along_columns(z, vectors, value, col) != 0.0, float("-inf"), z)
    elif op == "addrow":
        z = z + along_rows(z, vectors, value, row)
    elif op == "mulrow":
        z = z * along_rows(z, vectors, value, row)
    elif op == "fn":
        z = pointwise(value, 0, z, z, vectors, col, row, PRECISE)
    elif DECIDE and value == "bfloat16":
        z = z.to(tl.bfloat16).to(tl.float32)
    elif DECIDE and value == "float16":
        z = z.to(tl.float16).to(tl.float32)
    return z


@triton.jit
def transform(z, vectors, col, row, STEPS: tl.constexpr, COUNT: tl.constexpr, PRECISE: tl.constexpr):
    """z after the first COUNT steps, in float32 and without rounding steps."""
    for j in tl.static_range(COUNT):
        z = _stepped(z, vectors, col, row, STEPS, j, False, PRECISE)
    return z


@triton.jit
def decided(z, vectors, col, row, STEPS: tl.constexpr, PRECISE: tl.constexpr):
    """z after the whole chain, its rounding steps included: the logits of which max and argmax are taken."""
    for j in tl.static_range(len(STEPS) // 2):
        z = _stepped(z, vectors, col, row, STEPS, j, True, PRECISE)
    return z


@triton.jit
def _pulled(
    g,
    z,
    vectors,
    col,
    row,
    STEPS: tl.constexpr,
    J: tl.constexpr,
    ALONG_ROW: tl.constexpr,
    PRECISE: tl.constexpr,
):
    """g times the derivative of step J. ALONG_ROW leaves out derivatives that are one number a row."""
    op: tl.constexpr = STEPS[2 * J]
    value: tl.constexpr = STEPS[2 * J + 1]
    if op == "tanh":
        # 1 - tanh² x = 4t / (1 + t)² with t = exp(-2|x|), a form without cancellation
        t = tl.exp2(tl.abs(transform(z, vectors, col, row, STEPS, J, PRECISE)) * -TWO_LOG2E)
        r = 1.0 / (1.0 + t)
        g = g * (4.0 * t * (r * r))
    elif op == "sigmoid":
        t = tl.exp2(tl.abs(transform(z, vectors, col, row, STEPS, J, PRECISE)) * -LOG2E)
        g = g * (t / ((1.0 + t) * (1.0 + t)))
    elif op == "mulcol":
        g = g * along_columns(z, vectors, value, col)
    elif op == "setcol":
        replacement = along_columns(z, vectors, value, col)
        g = tl.where(replacement != replacement, g, 0.0)
    elif op == "dropcol":
        g = tl.where(along_columns(z, vectors, value, col) != 0.0, 0.0, g)
    elif op == "fn":
        x = transform(z, vectors, col, row, STEPS, J, PRECISE)
        g = pointwise(value, 1, x, g, vectors, col, row, PRECISE)
    elif not ALONG_ROW:
        if op == "mul":
            g = g * value
        elif op == "mulrow":
            g = g * along_rows(z, vectors, value, row)
    return g


@triton.jit
def pulled_back(g, z, vectors, col, row, STEPS: tl.constexpr, KEEP: tl.constexpr, PRECISE: tl.constexpr):
    """The gradient before step KEEP, for the gradient g after the last step. z is the raw logit h·w.

    Each step computes its input from z again; the compiler removes the repetition.
    """
    for i in tl.static_range(len(STEPS) // 2 - KEEP):
        g = _pulled(g, z, vectors, col, row, STEPS, len(STEPS) // 2 - 1 - i, False, PRECISE)
    return g


@triton.jit
def column_slope(z, vectors, col, row, STEPS: tl.constexpr, PRECISE: tl.constexpr):
    """The factor of dT/dz that differs along a row (`StepKind.varies`), in the shape of z."""
    g = tl.zeros_like(z) + 1.0
    for j in tl.static_range(len(STEPS) // 2):
        g = _pulled(g, z, vectors, col, row, STEPS, j, True, PRECISE)
    return g


@triton.jit
def row_slope(vectors, row, STEPS: tl.constexpr):
    """The factor of dT/dz that is one number a row (constants and mulrow), in the shape of row."""
    g = tl.zeros_like(row).to(tl.float32) + 1.0
    for j in tl.static_range(len(STEPS) // 2):
        g = _row_step(g, vectors, row, STEPS, j)
    return g


@triton.jit
def _row_step(g, vectors, row, STEPS: tl.constexpr, J: tl.constexpr):
    op: tl.constexpr = STEPS[2 * J]
    value: tl.constexpr = STEPS[2 * J + 1]
    if op == "mul":
        g = g * value
    elif op == "mulrow":
        g = g * along_rows(g, vectors, value, row)
    return g
