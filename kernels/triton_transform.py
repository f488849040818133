"""The Transform of a head inside a kernel: the chain, its derivative and its vectors, unrolled at compile
time.

A chain reaches a kernel as a constexpr tuple of ``(op, value)`` pairs (`steps_of`), so that every chain
becomes straight-line code in the epilogue and the empty chain costs nothing. All functions work on a float32
value ``z`` of any shape; ``col`` and ``row`` are integer tensors that broadcast against it and say which
vocabulary column and which token each element belongs to. ``vectors`` is the tuple ``(cols, stride_cols, V,
rows, stride_rows, N)``. This file must not know about tiles, windows or statistics.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusedhead.kernels.columns import Transform

VARYING = ("mulcol", "tanh", "sigmoid")  # steps whose derivative differs along a row


def steps_of(transform: Transform) -> tuple[tuple[str, float | int | str], ...]:
    """The chain as nested plain tuples, which a kernel takes as a constexpr (rounding steps included)."""
    return tuple((str(op), value) for op, value in transform.steps)


def varies_along_row(transform: Transform) -> bool:
    """Whether dT/dz differs from column to column, so that it has to be multiplied in element by element."""
    return any(op in VARYING for op, _ in transform.steps)


@triton.jit
def along_columns(vectors, index: tl.constexpr, col):
    """cols[index][col], zero past the vocabulary."""
    return tl.load(vectors[0] + index * vectors[1].to(tl.int64) + col, mask=col < vectors[2], other=0.0)


@triton.jit
def along_rows(vectors, index: tl.constexpr, row):
    """rows[index][row], zero past the last token."""
    return tl.load(vectors[3] + index * vectors[4].to(tl.int64) + row, mask=row < vectors[5], other=0.0)


@triton.jit
def tanh(x, PRECISE: tl.constexpr):
    """tanh in float32 to 1e-7 absolute; with PRECISE to 3e-7 relative near zero as well."""
    t = tl.exp2(-2.8853900817779268 * tl.abs(x))
    y = (1.0 - t) / (1.0 + t)
    y = tl.where(x < 0, -y, y)
    if PRECISE:
        s = x * x
        series = 0.021869488536155 + s * -0.008863235529902202
        series = 0.13333333333333333 + s * (-0.05396825396825397 + s * series)
        y = tl.where(tl.abs(x) < 0.3, x * (1.0 + s * (-0.3333333333333333 + s * series)), y)
    return y


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(-1.4426950408889634 * x))


@triton.jit
def transform(z, vectors, col, row, STEPS: tl.constexpr, COUNT: tl.constexpr, PRECISE: tl.constexpr):
    """The first COUNT steps applied to z, everything in float32 (rounding steps do nothing)."""
    for j in tl.static_range(COUNT):
        if STEPS[j][0] == "mul":
            z = z * STEPS[j][1]
        elif STEPS[j][0] == "add":
            z = z + STEPS[j][1]
        elif STEPS[j][0] == "tanh":
            z = tanh(z, PRECISE)
        elif STEPS[j][0] == "sigmoid":
            z = sigmoid(z)
        elif STEPS[j][0] == "addcol":
            z = z + along_columns(vectors, STEPS[j][1], col)
        elif STEPS[j][0] == "mulcol":
            z = z * along_columns(vectors, STEPS[j][1], col)
        elif STEPS[j][0] == "addrow":
            z = z + along_rows(vectors, STEPS[j][1], row)
        elif STEPS[j][0] == "mulrow":
            z = z * along_rows(vectors, STEPS[j][1], row)
    return z


@triton.jit
def decided(z, vectors, col, row, STEPS: tl.constexpr, PRECISE: tl.constexpr):
    """The whole chain with its rounding steps in force: the logits on which max and argmax are taken."""
    for j in tl.static_range(len(STEPS)):
        if STEPS[j][0] == "round":
            if STEPS[j][1] == "bfloat16":
                z = z.to(tl.bfloat16).to(tl.float32)
            elif STEPS[j][1] == "float16":
                z = z.to(tl.float16).to(tl.float32)
        else:
            z = transform(z, vectors, col, row, (STEPS[j],), 1, PRECISE)
    return z


@triton.jit
def pulled_back(g, z, vectors, col, row, STEPS: tl.constexpr, KEEP: tl.constexpr, PRECISE: tl.constexpr):
    """The gradient before step KEEP, given the gradient g after the last step. z is the raw logit h·w.

    Values between the steps are written out again for each step; the compiler merges the copies.
    """
    for i in tl.static_range(len(STEPS) - KEEP):
        j: tl.constexpr = len(STEPS) - 1 - i
        if STEPS[j][0] == "mul":
            g = g * STEPS[j][1]
        elif STEPS[j][0] == "tanh":
            # 1 - tanh² without its cancellation: 4t / (1 + t)² with t = exp(-2|x|)
            t = tl.exp2(-2.8853900817779268 * tl.abs(transform(z, vectors, col, row, STEPS, j, PRECISE)))
            g = g * (4.0 * t / ((1.0 + t) * (1.0 + t)))
        elif STEPS[j][0] == "sigmoid":
            t = tl.exp2(-1.4426950408889634 * tl.abs(transform(z, vectors, col, row, STEPS, j, PRECISE)))
            g = g * (t / ((1.0 + t) * (1.0 + t)))
        elif STEPS[j][0] == "mulcol":
            g = g * along_columns(vectors, STEPS[j][1], col)
        elif STEPS[j][0] == "mulrow":
            g = g * along_rows(vectors, STEPS[j][1], row)
    return g


@triton.jit
def column_slope(z, vectors, col, row, STEPS: tl.constexpr, PRECISE: tl.constexpr):
    """The part of dT/dz that differs along a row (VARYING steps), shaped as z."""
    g = tl.zeros_like(z) + 1.0
    for i in tl.static_range(len(STEPS)):
        j: tl.constexpr = len(STEPS) - 1 - i
        if STEPS[j][0] == "mulcol" or STEPS[j][0] == "tanh" or STEPS[j][0] == "sigmoid":
            before = transform(z, vectors, col, row, STEPS, j, PRECISE)
            g = pulled_back(g, before, vectors, col, row, (STEPS[j],), 0, PRECISE)
    return g


@triton.jit
def row_slope(vectors, row, STEPS: tl.constexpr):
    """The part of dT/dz that is one number a row (constants and mulrow), shaped as row."""
    g = tl.zeros_like(row).to(tl.float32) + 1.0
    for j in tl.static_range(len(STEPS)):
        if STEPS[j][0] == "mul" or STEPS[j][0] == "mulrow":
            g = pulled_back(g, g, vectors, row, row, (STEPS[j],), 0, False)
    return g
