"""The text of a token program: the ATen calls between logits and results.

A token program serves what no row statistic expresses: a divergence between two heads, soft targets, top-k, a chain of
pointwise ops. It keeps the user's own ATen calls in a form that runs on any window of tokens: dimension 0 counts the
tokens, and no call mixes tokens. The text is an argument of the fused op, so that a compiled graph needs no state
elsewhere. Its syntax is Python's, and it is parsed, never executed. It is one line (shown here as several), because a
compiler may copy it into a comment:

    v0 = head(r0, t1, t2, r3, '', bfloat16);       r0 [N, D] hidden, t1 [V, D], t2 [C, V], r3 [N, R] vectors
    v1 = log_softmax.int(v0, 1, float32);
    v2 = mul.Tensor(v1, r4);
    v3 = sum.dim_IntList(v2, [1]);
    return v3

``t3`` is all of input 3, ``r3`` the window's rows of it, ``v3`` the result of line 3.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedhead.kernels.contract import stat_dtype
from fusedhead.kernels.transform.bias_rounding import rounded_bias
from fusedhead.kernels.transform.transform import Transform, apply, parse

HEAD, ITEM = "head", "item"


class Ref(NamedTuple):
    """An operand of a line."""

    kind: str  # "v": the result of a line; "t": all of an input; "r": the window's rows of an input
    at: int  # the number of the line or of the input

    @property
    def text(self) -> str:
        return f"{self.kind}{self.at}"


class Line(NamedTuple):
    """One call. ``op`` is "head", "item" (one result of a call that has several) or an ATen overload ("mul.Tensor")."""

    op: str
    args: tuple
    kwargs: tuple[tuple[str, Any], ...] = ()


class RowProgram(NamedTuple):
    lines: tuple[Line, ...]
    results: tuple[int, ...]  # the lines whose results the program returns

    @property
    def text(self) -> str:
        """The program as text, which `read` parses back to an equal program."""
        out = []
        for i, (op, args, kwargs) in enumerate(self.lines):
            given = [argument_text(a) for a in args] + [f"{k}={argument_text(a)}" for k, a in kwargs]
            out.append(f"v{i} = {op}({', '.join(given)})")
        return "; ".join((*out, f"return {', '.join(f'v{i}' for i in self.results)}"))

    @property
    def heads(self) -> tuple[Line, ...]:
        return tuple(line for line in self.lines if line.op == HEAD)


class Unspeakable(ValueError):
    """Raised for a value that cannot be written as text, or for text that is not a program."""


def argument_text(value: Any) -> str:
    """An argument as text.

    Raises Unspeakable for anything but an operand, a number, a dtype, a string, None, or a list of these.
    """
    if isinstance(value, Ref):
        return value.text
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(argument_text, value))}]"
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if value is None or isinstance(value, (bool, int, str)):
        return repr(value)
    if isinstance(value, float):
        if math.isnan(value):
            return "nan"
        return repr(value) if math.isfinite(value) else ("inf" if value > 0 else "-inf")
    raise Unspeakable(f"{value!r} ({type(value).__name__}) cannot be written into a row program")


NAMED_VALUES: Mapping[str, Any] = {"inf": math.inf, "nan": math.nan} | {
    str(x).removeprefix("torch."): x for x in vars(torch).values() if isinstance(x, torch.dtype)
}


def _value(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value):
            return value
        case ast.List(elts):
            return tuple(_value(e) for e in elts)
        case ast.UnaryOp(op=ast.USub(), operand=inner):
            return -_value(inner)
        case ast.Name(id=name) if name in NAMED_VALUES:
            return NAMED_VALUES[name]
        case ast.Name(id=name) if name[0] in "vtr" and name[1:].isdigit():
            return Ref(name[0], int(name[1:]))
    raise Unspeakable(f"{ast.unparse(node)!r} is no operand of a row program")


@lru_cache(maxsize=256)
def read(text: str) -> RowProgram:
    """Parse the text of a program. Raises Unspeakable with the part that is not valid."""
    *calls, last = ast.parse(f"def program(): {text}").body[0].body  # type: ignore[attr-defined]
    lines = []
    for statement in calls:
        if not isinstance(statement, ast.Assign) or not isinstance(statement.value, ast.Call):
            raise Unspeakable(f"{ast.unparse(statement)!r} is no line of a row program")
        call = statement.value
        kwargs = tuple((str(k.arg), _value(k.value)) for k in call.keywords)
        lines.append(Line(ast.unparse(call.func), tuple(map(_value, call.args)), kwargs))
    if not isinstance(last, ast.Return) or last.value is None:
        raise Unspeakable("a row program ends with what it returns")
    out = last.value.elts if isinstance(last.value, ast.Tuple) else [last.value]
    return RowProgram(tuple(lines), tuple(_value(e).at for e in out))


def overload(name: str) -> Any:
    """The ATen overload of a name such as "mul.Tensor"."""
    packet, _, which = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), which)


def head_product(head: Line, tensors: Sequence[Tensor]) -> Tensor:
    """h wᵀ of one head, [n, V] in the dtype of h. It includes the bias where the program rounds h wᵀ + b only once."""
    h, w, cols, _, transform, _ = (operand(a, (), tensors) for a in head.args)
    bias = rounded_bias(parse(transform), h.dtype)
    return h @ w.t() if bias is None else torch.addmm(cols[bias].to(h.dtype), h, w.t())


def head_logits(z: Tensor, cols: Tensor, rows: Tensor, transform: str, dtype: torch.dtype) -> Tensor:
    """The logits of a head, [n, V] of ``dtype``, from z, its `head_product`: the transform applied in float32."""
    chain = parse(transform)
    if rounded_bias(chain, z.dtype) is not None:
        chain = Transform(chain.steps[2:])
    if not chain.smooth.steps:
        return z.to(dtype)
    wide = stat_dtype(z.dtype)
    return apply(chain, z.to(wide), cols.to(wide), rows.to(wide).t(), decide=True).to(dtype)


def operand(x: Any, values: Sequence[Any], tensors: Sequence[Tensor]) -> Any:
    """The value of an argument of a line.

    A function of the module and no closure: a closure that calls itself is a reference cycle, which would keep a
    window's tensors alive until the next garbage collection.
    """
    if isinstance(x, Ref):
        return values[x.at] if x.kind == "v" else tensors[x.at]
    return tuple(operand(e, values, tensors) for e in x) if isinstance(x, tuple) else x


@lru_cache(maxsize=256)
def last_uses_by_line(program: RowProgram) -> dict[int, list[int]]:
    """For each line, the earlier results that it is the last to use. Results that the program returns are left out."""
    last: dict[int, int] = {}
    for at, line in enumerate(program.lines):
        stack: list[Any] = [*line.args, *(v for _, v in line.kwargs)]
        while stack:
            x = stack.pop()
            if isinstance(x, Ref):
                last |= {x.at: at} if x.kind == "v" else {}
            elif isinstance(x, tuple):
                stack += x
    found: dict[int, list[int]] = {}
    for value, at in last.items():
        if value not in program.results:
            found.setdefault(at, []).append(value)
    return found


def run(program: RowProgram, tensors: Sequence[Tensor], products: Sequence[Tensor] | None = None) -> list[Tensor]:
    """The program's results for the tokens of the row inputs.

    ``products``, one `head_product` per head in order, are used instead of computing them.
    """
    values: list[Any] = []
    given = iter(products or ())
    last_use = last_uses_by_line(program)
    for line, (op, args, kwargs) in enumerate(program.lines):
        here = [operand(a, values, tensors) for a in args]
        if op == HEAD:
            _, _, cols, rows, transform, dtype = here
            z = head_product(program.lines[line], tensors) if products is None else next(given)
            values.append(head_logits(z, cols, rows, transform, dtype))
        elif op == ITEM:
            values.append(here[0][here[1]])
        else:
            values.append(overload(op)(*here, **{k: operand(a, values, tensors) for k, a in kwargs}))
        del here
        for done in last_use.get(line, ()):
            values[done] = None
    return [values[i] for i in program.results]
