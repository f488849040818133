"""A function outside of `kernels/` takes at most six parameters, unless its signature is given from outside.

| signature                             | is given by                                                           |
|---------------------------------------|-----------------------------------------------------------------------|
| a public function                     | the names that users know: those of torch's function of the same name |
| an implementation or fake of an op    | the op's schema, whose arguments arrive one by one                    |
| a rule                                | the ATen op that it reads                                             |
| ``forward`` of an autograd function   | autograd, which gives a gradient for each argument                    |
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import torch

import fusedhead
from fusedhead.lowering.ops import SCHEMAS
from fusedhead.lowering.shards import SHARD_SCHEMAS
from fusedhead.rules import RULES
from fusedhead.rules.table import TOKEN_RULES

ROOT = Path(__file__).parents[1]
MOST = 6
PUBLIC = {"linear_cross_entropy"}  # of torch 2.13 and `F.cross_entropy` are its names

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions() -> Iterator[tuple[str, Function, ast.ClassDef | None]]:
    """(module, function, the class it is a method of) of the package outside of the kernels."""
    for top, package in (("fusion_pass", "fusedhead"), ("lowering", "fusedhead.lowering")):
        for file in sorted((ROOT / top).rglob("*.py")):
            parts = [part for part in file.relative_to(ROOT / top).with_suffix("").parts if part != "__init__"]
            tree = ast.parse(file.read_text(encoding="utf-8"))
            owners = {member: node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) for member in node.body}
            for node in ast.walk(tree):
                if isinstance(node, Function):
                    yield ".".join((package, *parts)), node, owners.get(node)


def parameters(function: Function) -> list[str]:
    """The names of a function's parameters, without ``self`` and ``cls``."""
    every = function.args
    names = [each.arg for each in (*every.posonlyargs, *every.args, *every.kwonlyargs)]
    return names[1:] if names[:1] in (["self"], ["cls"]) else names


def ops_arguments() -> list[list[str]]:
    """The names of the arguments of each op of the package."""
    overloads = [getattr(torch.ops.fusedhead, name).default for name in (*SCHEMAS, *SHARD_SCHEMAS)]
    return [[argument.name for argument in overload._schema.arguments] for overload in overloads]


def rules_arguments() -> dict[tuple[str, str], int]:
    """(module, name) of each rule -> how many parameters its ATen ops give it, the context included."""
    rules = [(op, rule) for op, rule in RULES.items()]
    rules += [(op, each.read) for op, several in TOKEN_RULES.items() for each in several]
    counts: dict[tuple[str, str], int] = {}
    for op, rule in rules:
        key = rule.__module__, rule.__name__
        counts[key] = max(counts.get(key, 0), 1 + len(op._schema.arguments))
    return counts


def test_functions_take_at_most_six_parameters() -> None:
    schemas, rules = ops_arguments(), rules_arguments()

    def is_given(module: str, function: Function, owner: ast.ClassDef | None) -> bool:
        names = parameters(function)
        return (
            function.name in PUBLIC
            or any(names == schema[: len(names)] for schema in schemas)
            or len(names) <= rules.get((module, function.name), 0)
            or (function.name == "forward" and owner is not None and "Function" in ast.unparse(owner.bases[0]))
        )

    long = {
        f"{module}.{function.name}: {len(parameters(function))}"
        for module, function, owner in functions()
        if len(parameters(function)) > MOST and not is_given(module, function, owner)
    }
    assert not long, "group parameters that belong together"
    assert set(fusedhead.__all__) >= PUBLIC
