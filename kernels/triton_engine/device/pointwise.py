"""A pointwise function (`transform.pointwise`) inside a kernel, unrolled at compile time into straight-line code.

The function's text is a constexpr that is parsed while the kernel is compiled. It applies to a float32 value ``z``, a
tile or a vector, as in `device.transform`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusedhead.kernels.triton_engine.constants import LOG2E
from fusedhead.kernels.triton_engine.device.functions import exp, expm1, log, log1p, quotient, sign, sqrt, tanh
from fusedhead.kernels.triton_engine.device.vectors import along_columns, along_rows


@triton.constexpr_function
def _code(text, which):
    """The code of the function (which = 0) or of its gradient (1)."""
    return text.split("|")[which]


@triton.constexpr_function
def _count(code):
    """The number of instructions; the entry after the last names the result."""
    return code.count(";")


@triton.constexpr_function
def _word(code, i, j):
    """Word j of entry i: 0 is the op, the others its operands; "" past the last."""
    words = code.split(";")[i].replace("(", ",").rstrip(")").split(",")
    return words[j] if j < len(words) else ""


@triton.constexpr_function
def _kind(word):
    return word[0] if word[0] in "zg#cr" else "number"


@triton.constexpr_function
def _index(word):
    return int(word[1:])


@triton.constexpr_function
def _number(word):
    return float(word)


@triton.jit
def _operand(WORD: tl.constexpr, values, z, g, vectors, col, row):
    kind: tl.constexpr = _kind(WORD)
    if kind == "z":
        x = z
    elif kind == "g":
        x = g
    elif kind == "#":
        x = values[_index(WORD) + 1]
    elif kind == "c":
        x = along_columns(z, vectors, _index(WORD), col)
    elif kind == "r":
        x = along_rows(z, vectors, _index(WORD), row)
    else:
        x = tl.zeros_like(z) + _number(WORD)
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
        y = log(a, PRECISE) * LOG2E
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
def _instruction(CODE: tl.constexpr, AT: tl.constexpr, values, z, g, vectors, col, row, PRECISE: tl.constexpr):
    a = _operand(_word(CODE, AT, 1), values, z, g, vectors, col, row)
    b = a
    c = a
    if _word(CODE, AT, 2) != "":
        b = _operand(_word(CODE, AT, 2), values, z, g, vectors, col, row)
    if _word(CODE, AT, 3) != "":
        c = _operand(_word(CODE, AT, 3), values, z, g, vectors, col, row)
    return _computed(_word(CODE, AT, 0), a, b, c, PRECISE)


@triton.jit
def pointwise(TEXT: tl.constexpr, WHICH: tl.constexpr, z, g, vectors, col, row, PRECISE: tl.constexpr):
    """The function of z (WHICH = 0), or g times its derivative (1); the result has the shape of z."""
    code: tl.constexpr = _code(TEXT, WHICH)
    values = (z,)  # a tuple cannot start empty, so the result of instruction i is at index i + 1
    for i in tl.static_range(_count(code)):
        values = values + (_instruction(code, i, values, z, g, vectors, col, row, PRECISE),)  # type: ignore[assignment]  # noqa: RUF005
    return _operand(_word(code, _count(code), 0), values, z, g, vectors, col, row) + tl.zeros_like(z)
