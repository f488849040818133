"""Making a failing program small: drop statements, unwrap blocks, pass values through, set options to their defaults.

Greedy, until nothing more can go. A candidate counts when it still differs in the same kind.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

from tests.fuzz.program import Block, Case, Statement, source

Fails = Callable[[Case], bool]
Body = tuple[Statement, ...]


def smaller_statements(statement: Statement) -> Iterator[Body]:
    """What one statement can be replaced by, the smallest first."""
    yield ()
    if isinstance(statement, Block):
        yield statement.body
        for body in smaller_bodies(statement.body):
            yield (Block(statement.header, body or ("pass",)),)
        return
    assigned = re.fullmatch(r"(\w+) = (.*)", statement)
    if assigned:
        name, expression = assigned.groups()
        for source_name in dict.fromkeys(re.findall(r"(?<![\w.'])([a-z]+\d*)(?![\w('=])", expression)):
            if source_name not in ("torch", name) and expression != source_name:
                yield (f"{name} = {source_name}",)
        for option in re.findall(r", \w+=[^,()]+(?:\(\))?", expression):
            yield (f"{name} = {expression.replace(option, '', 1)}",)


def smaller_bodies(body: Body) -> Iterator[Body]:
    for at in reversed(range(len(body))):
        for replacement in smaller_statements(body[at]):
            yield (*body[:at], *replacement, *body[at + 1 :])


def without_alias(case: Case) -> Iterator[Case]:
    """``b = a`` at the top level, with b renamed to a."""
    for at, statement in enumerate(case.body):
        alias = isinstance(statement, str) and re.fullmatch(r"([a-z]+\d*) = ([a-z]+\d*)", statement)
        if alias:
            old, new = alias.groups()
            rest = tuple(renamed(s, old, new) for s in case.body[at + 1 :])
            returns = tuple(dict.fromkeys(new if r == old else r for r in case.returns))
            yield replace(case, body=(*case.body[:at], *rest), returns=returns)


def renamed(statement: Statement, old: str, new: str) -> Statement:
    if isinstance(statement, Block):
        header = re.sub(rf"\b{old}\b", new, statement.header)
        return Block(header, tuple(renamed(s, old, new) for s in statement.body))
    return re.sub(rf"\b{old}\b", new, statement)


def smaller(case: Case) -> Iterator[Case]:
    yield from without_alias(case)
    for name in case.returns:
        if len(case.returns) > 1:
            yield replace(case, returns=tuple(r for r in case.returns if r != name))
    for body in smaller_bodies(case.body):
        yield replace(case, body=body)
    for option, plain in (
        ("dynamic", False),
        ("ambient_autocast", False),
        ("no_grad", False),
        ("logits", "eager"),
        ("dtype", "float32"),
    ):
        if getattr(case, option) != plain:
            yield replace(case, **{option: plain})
    for name in case.inputs:
        used = any(re.search(rf"\b{name}\b", line) for line in source(case).splitlines()[1:])
        if not used:
            yield replace(case, inputs={k: v for k, v in case.inputs.items() if k != name})
        if case.inputs[name].endswith(".requires_grad_()"):
            shorter = case.inputs[name].removesuffix(".requires_grad_()")
            yield replace(case, inputs={**case.inputs, name: shorter})
    for size, value in case.sizes.items():
        if value > 2:
            yield replace(case, sizes={**case.sizes, size: 2 if size in "BT" else value - 1})


def weight(case: Case) -> tuple[int, int]:
    return len(source(case)), sum(case.sizes.values())


def minimise(case: Case, fails: Fails, seconds: float = 120.0) -> Case:
    """The smallest program found for which ``fails`` still holds."""
    deadline = time.monotonic() + seconds
    tried = {source(case)}
    shrunk = True
    while shrunk and time.monotonic() < deadline:
        shrunk = False
        for candidate in smaller(case):
            key = repr(candidate)
            if key in tried or time.monotonic() > deadline:
                continue
            tried.add(key)
            if fails(candidate):
                case, shrunk = candidate, True
                break
    return case
