"""The code of a pointwise function (`kernels.pointwise`) inside a kernel: unrolled into straight-line code.

A code reaches a kernel as a constexpr, ``(instructions, result)`` with an instruction ``(op, kind, value, kind, value,
...)``: two entries for each operand. It works on a float32 value ``z``, a tile or a vector, as `triton_transform` does.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusedhead.kernels.pointwise import Code
from fusedhead.kernels.triton_functions import exp, expm1, log, log1p, quotient, sign, sqrt, tanh
from fusedhead.kernels.triton_vectors import along_columns, along_rows

Entry = tuple[str | float | int, ...]


def _entry(arg: str | float) -> Entry:
    if isinstance(arg, float):
        return "number", arg
    return arg[0], int(arg[1:] or 0) + (arg[0] == "#")  # `pointwise` keeps result i at i + 1


def encoded(code: Code) -> tuple[tuple[Entry, ...], Entry]:
    """A code as a kernel takes it."""
    lines = tuple((op, *(x for arg in args for x in _entry(arg))) for op, args in code.instructions)
    result = code.result if code.result[0] in "zg#cr" else float(code.result)
    return lines, _entry(result)


@triton.jit
def _operand(ENTRY: tl.constexpr, J: tl.constexpr, values, z, g, vectors, col, row):
    kind: tl.constexpr = ENTRY[J]
    value: tl.constexpr = ENTRY[J + 1]
    if kind == "z":
        x = z
    elif kind == "g":
        x = g
    elif kind == "#":
        x = values[value]
    elif kind == "c":
        x = along_columns(z, vectors, value, col)
    elif kind == "r":
        x = along_rows(z, vectors, value, row)
    else:
        x = tl.zeros_like(z) + value
    return x


@triton.jit
def _computed(op: tl.constexpr, a, b, c, PRECISE: tl.constexpr):
    if op == "add":
        y = a + b
    elif op == "sub":
        y = a - b
    elif op == "mul":
        y = a * b
    elif op == "div":
        y = quotient(a, b, PRECISE)
    elif op == "neg":
        y = -a
    elif op == "abs":
        y = tl.abs(a)
    elif op == "sign":
        y = sign(a)
    elif op == "reciprocal":
        y = quotient(tl.zeros_like(a) + 1.0, a, PRECISE)
    elif op == "sqrt":
        y = sqrt(a, PRECISE)
    elif op == "rsqrt":
        y = quotient(tl.zeros_like(a) + 1.0, sqrt(a, PRECISE), PRECISE)
    elif op == "exp":
        y = exp(a, PRECISE)
    elif op == "exp2":
        y = tl.exp2(a)
    elif op == "expm1":
        y = expm1(a, PRECISE)
    elif op == "log":
        y = log(a, PRECISE)
    elif op == "log2":
        y = log(a, PRECISE) * 1.4426950408889634
    elif op == "log1p":
        y = log1p(a, PRECISE)
    elif op == "sin":
        y = tl.sin(a)
    elif op == "cos":
        y = tl.cos(a)
    elif op == "tanh":
        y = tanh(a, PRECISE)
    elif op == "erf":
        y = tl.erf(a)
    elif op == "minimum":
        y = tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)
    elif op == "maximum":
        y = tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
    elif op == "where":
        y = tl.where(a, b, c)
    elif op == "eq":
        y = a == b
    elif op == "ne":
        y = a != b
    elif op == "lt":
        y = a < b
    elif op == "le":
        y = a <= b
    elif op == "gt":
        y = a > b
    elif op == "ge":
        y = a >= b
    elif op == "bitwise_and":
        y = a & b
    elif op == "bitwise_or":
        y = a | b
    else:
        tl.static_assert(op == "bitwise_not")
        y = a == 0
    return y


@triton.jit
def _instruction(LINE: tl.constexpr, values, z, g, vectors, col, row, PRECISE: tl.constexpr):
    count: tl.constexpr = len(LINE) // 2
    a = _operand(LINE, 1, values, z, g, vectors, col, row)
    b = a
    c = a
    if count > 1:
        b = _operand(LINE, 3, values, z, g, vectors, col, row)
    if count > 2:
        c = _operand(LINE, 5, values, z, g, vectors, col, row)
    return _computed(LINE[0], a, b, c, PRECISE)


@triton.jit
def pointwise(CODE: tl.constexpr, z, g, vectors, col, row, PRECISE: tl.constexpr):
    """The result of a code, shaped as z."""
    values = (z,)  # a tuple cannot begin empty: the result of instruction i is at i + 1
    for i in tl.static_range(len(CODE[0])):
        values = values + (_instruction(CODE[0][i], values, z, g, vectors, col, row, PRECISE),)  # type: ignore[assignment]  # noqa: RUF005
    return _operand(CODE[1], 0, values, z, g, vectors, col, row) + tl.zeros_like(z)
