"""A random program as data: inputs, statements, what it returns; and its Python source.

Statements form a tree (a block has a header line and a body), so that a failing program can be minimised by
dropping statements. The program is written once and read in two precisions: `truth` is the same source with every
dtype in it replaced by float64. This file draws nothing and compares nothing.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

INDENT = "    "


@dataclass(frozen=True)
class Block:
    """``header`` and the statements indented below it."""

    header: str
    body: tuple[Statement, ...]


Statement = str | Block


@dataclass(frozen=True)
class Case:
    """One program.

    sizes: the integers that the inputs' shapes are made of (B, T, D, V).
    inputs: name -> expression over the sizes, ``dtype`` and torch.
    """

    sizes: dict[str, int]
    inputs: dict[str, str]
    body: tuple[Statement, ...]
    returns: tuple[str, ...]
    dtype: str = "float32"
    dynamic: bool = False
    ambient_autocast: bool = False
    no_grad: bool = False
    logits: str = "eager"  # what the caller gets in the place of returned logits
    decisions: frozenset[str] = field(default_factory=frozenset)  # outputs that hang on comparisons of logits

    def __str__(self) -> str:
        return source(self)


def lines(statements: tuple[Statement, ...], depth: int = 1) -> Iterator[str]:
    for statement in statements:
        if isinstance(statement, str):
            yield INDENT * depth + statement
        else:
            yield INDENT * depth + statement.header
            yield from lines(statement.body, depth + 1)


def source(case: Case) -> str:
    """``def program(...)`` as text."""
    return "\n".join(
        [f"def program({', '.join(case.inputs)}):", *lines(case.body), f"{INDENT}return ({', '.join(case.returns)},)"]
    )


# What makes the float64 twin of a program out of its text, in this order.
TO_DOUBLE = (
    ('torch.autocast("cpu", torch.bfloat16)', 'torch.autocast("cpu", enabled=False)'),
    ("torch.bfloat16", "torch.float64"),
    ("torch.float32", "torch.float64"),
    (".float()", ".double()"),
    (".bfloat16()", ".double()"),
)


def function(text: str, name: str = "program") -> Callable[..., Any]:
    """The function that a program's source defines."""
    scope: dict[str, Any] = {"torch": torch, "F": torch.nn.functional, "checkpoint": torch.utils.checkpoint.checkpoint}
    exec(compile(text, f"<{name}>", "exec"), scope)
    return scope["program"]


def program(case: Case) -> Callable[..., Any]:
    return function(source(case))


def truth(case: Case) -> Callable[..., Any]:
    text = source(case)
    for old, new in TO_DOUBLE:
        text = text.replace(old, new)
    return function(text, "truth")


def make_inputs(case: Case, sizes: dict[str, int], *, double: bool = False) -> list[Any]:
    """Fresh inputs, equal numbers at every call; floating ones in float64 where ``double``."""
    torch.manual_seed(1)
    scope: dict[str, Any] = {"torch": torch, "dtype": getattr(torch, case.dtype), **sizes}
    result = []
    for expression in case.inputs.values():
        value = eval(expression, scope)
        if double and isinstance(value, torch.Tensor) and value.is_floating_point():
            value = value.detach().double().requires_grad_(value.requires_grad)
        result.append(value)
    return result


def as_test(case: Case) -> str:
    """A ready test: it goes into tests/fuzz/test_found.py as it is."""
    fields = {
        "sizes": case.sizes,
        "inputs": case.inputs,
        "body": case.body,
        "returns": case.returns,
        "dtype": case.dtype,
        "dynamic": case.dynamic,
        "ambient_autocast": case.ambient_autocast,
        "no_grad": case.no_grad,
        "logits": case.logits,
        "decisions": case.decisions,
    }
    defaults = Case({}, {}, (), ())
    shown = [
        f"{k}={v!r},"
        for k, v in fields.items()
        if k in ("sizes", "inputs", "body", "returns") or v != getattr(defaults, k)
    ]
    shown_source = textwrap.indent(source(case), INDENT + "# ")
    return "\n".join(
        ["def test_...():", shown_source, f"{INDENT}agrees(Case(", *(INDENT * 2 + s for s in shown), f"{INDENT}))"]
    )
