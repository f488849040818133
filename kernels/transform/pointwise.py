"""A pointwise function of the logits and its derivative, as straight-line code inside a step of a `Transform`.

The code is generated from the user's op (`fusedhead.rules.pointwise`). Its text has two or three parts between bars:
the function of z; g times its derivative, for a gradient g of the result; and, where an engine may have a kernel of its
own for it (`native`), the op's name with its constants.

    neg(z);exp(#0);add(1.0,#1);div(1.0,#2);#3|...;mul(g,#7);#8                        a sigmoid
    ...;#4|...;#10|gelu(none)

Instructions are numbered from 0 and separated by semicolons; the last entry names the result. An operand is ``z``,
``g``, ``#i`` (the result of instruction i), ``c2`` (column vector 2, along the vocabulary), ``r0`` (row vector 0, along
the tokens), or a number. The ops are those of `OPS`, named as torch's ``prims``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

OPS: Mapping[str, Callable[..., Tensor]] = {
    name: getattr(torch, name)
    for name in (
        *("neg", "abs", "sign", "reciprocal", "sqrt", "rsqrt", "exp", "exp2", "expm1", "log", "log2", "log1p"),
        *("sin", "cos", "tanh", "erf", "add", "sub", "mul", "div", "minimum", "maximum", "where"),
        *("eq", "ne", "lt", "le", "gt", "ge", "bitwise_and", "bitwise_or", "bitwise_not"),
    )
}
BOOLEAN_OPS = frozenset(("eq", "ne", "lt", "le", "gt", "ge", "bitwise_and", "bitwise_or", "bitwise_not"))  # are bool
VECTOR = re.compile(r"[cr]\d+")
OPERAND = re.compile(r"z|g|#\d+|[cr]\d+")


class Instruction(NamedTuple):
    op: str
    args: tuple[str | float, ...]


class Op(NamedTuple):
    op: str
    args: tuple[str | float | None, ...]  # its constants; z is implied

    @property
    def text(self) -> str:
        return f"{self.op}({','.join(map(str, self.args))})"


class Code(NamedTuple):
    instructions: tuple[Instruction, ...]
    result: str

    @property
    def text(self) -> str:
        calls = (f"{op}({','.join(map(str, args))})" for op, args in self.instructions)
        return ";".join((*calls, self.result))


class Function(NamedTuple):
    value: Code  # reads z
    gradient: Code  # reads z and g
    op: Op | None = None  # the entry of `native.NATIVE` that computes both, if there is one

    @property
    def codes(self) -> tuple[Code, Code]:
        return self.value, self.gradient

    @property
    def text(self) -> str:
        return f"{self.value.text}|{self.gradient.text}" + (f"|{self.op.text}" if self.op else "")


def _operand(word: str) -> str | float:
    return word if OPERAND.fullmatch(word) else float(word)


def _code(text: str) -> Code:
    *calls, result = text.split(";")
    instructions = []
    for call in calls:
        op, _, args = call.removesuffix(")").partition("(")
        if op not in OPS:
            raise ValueError(f"{op!r} in a pointwise function is not known; expected one of {', '.join(OPS)}")
        instructions.append(Instruction(op, tuple(map(_operand, args.split(",")))))
    return Code(tuple(instructions), result)


def _constant(word: str) -> str | float | None:
    try:
        return None if word == "None" else float(word)
    except ValueError:
        return word


def _op(text: str) -> Op:
    name, _, args = text.removesuffix(")").partition("(")
    return Op(name, tuple(map(_constant, args.split(","))) if args else ())


@lru_cache(maxsize=256)
def parse_function(text: str) -> Function:
    """Parse a function's text. Raises ValueError with the part that is not valid."""
    value, bar, rest = text.partition("|")
    gradient, _, op = rest.partition("|")
    if not bar:
        raise ValueError(f"a pointwise function is two codes around a bar, got {text!r}")
    return Function(_code(value), _code(gradient), _op(op) if op else None)


def vectors(text: str) -> Iterator[tuple[str, int]]:
    """("c" or "r", index) of each column or row vector that the function reads."""
    return ((word[0], int(word[1:])) for word in dict.fromkeys(re.findall(rf"(?<![\w.#]){VECTOR.pattern}", text)))


def shifted(text: str, columns: int) -> str:
    """The same function with ``columns`` added to the index of every column vector."""
    return re.sub(r"(?<![\w.#])c(\d+)", lambda match: f"c{int(match[1]) + columns}", text)


@lru_cache(maxsize=256)
def last_uses(code: Code) -> Mapping[int, tuple[int, ...]]:
    """For each instruction, the earlier results that it is the last to read."""
    last = {
        int(arg[1:]): at
        for at, (_, args) in enumerate(code.instructions)
        for arg in args
        if isinstance(arg, str) and arg[0] == "#"
    }
    last.pop(int(code.result[1:]) if code.result[0] == "#" else -1, None)
    uses: dict[int, tuple[int, ...]] = {}
    for value, at in last.items():
        uses[at] = (*uses.get(at, ()), value)
    return uses


def most_alive(code: Code) -> int:
    """The largest number of results that `run` holds at the same time."""
    alive = most = 0
    for at in range(len(code.instructions)):
        alive += 1
        most = max(most, alive)
        alive -= len(last_uses(code).get(at, ()))
    return most


def run(code: Code, z: Tensor, cols: Tensor, rows: Tensor, g: Tensor | None = None) -> Tensor:
    """The result [n, v] of a code, for z and g [n, v], cols [C, v], rows [R, n], all of one dtype and left unchanged.

    Unless an input requires grad, a result may be written over an earlier one that is no longer read.
    """
    values: list[Any] = []
    spent: list[Tensor] = []  # results of the shape and dtype of z that may be overwritten
    reuse = not any(x is not None and x.requires_grad for x in (z, cols, rows, g))

    def read(arg: str | float) -> Any:
        if isinstance(arg, float):
            return z.new_full((), arg)
        if arg[0] == "#":
            return values[int(arg[1:])]
        if arg[0] == "c":
            return cols[int(arg[1:])]
        if arg[0] == "r":
            return rows[int(arg[1:])][:, None]
        return z if arg == "z" else g

    for at, (op, args) in enumerate(code.instructions):
        inputs = [read(arg) for arg in args]
        for done in last_uses(code).get(at, ()):
            if reuse and values[done].shape == z.shape and values[done].dtype == z.dtype:
                spent.append(values[done])
            values[done] = None
        like_z = inputs[-1].dtype == z.dtype and any(x.shape == z.shape for x in inputs)
        over = spent and like_z and op not in BOOLEAN_OPS
        values.append(OPS[op](*inputs, out=spent.pop()) if over else OPS[op](*inputs))
        del inputs
    result = read(float(code.result) if not OPERAND.fullmatch(code.result) else code.result)
    return result.expand(z.shape)
