"""Every reason for which something is left is in a table, with an id and a sentence that its fields fill in."""

from __future__ import annotations

import ast
import re
import string
from collections.abc import Iterator
from pathlib import Path

import pytest

import fusedhead
from fusedhead.graph.reasons import Reason, refuse, tables
from fusedhead.report.coverage import sentences

PACKAGE = Path(fusedhead.__file__).parent
REFUSING = ("Escape", "refuse")
TABLES = tables()  # all of them: `import fusedhead` imports every module that refuses


def refusals() -> Iterator[tuple[str, ast.Call]]:
    """Every call in the package that gives a reason, with its file and line."""
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in REFUSING:
                yield f"{file.relative_to(PACKAGE)}:{node.lineno}", node


def fields(reason: Reason) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(reason.value) if name}


def test_the_tables_of_reasons_are_all_listed() -> None:
    trees = (ast.parse(file.read_text(encoding="utf-8")) for file in PACKAGE.rglob("*.py"))
    classes = (node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef))
    written = [node.name for node in classes if any(ast.unparse(base) == "Reason" for base in node.bases)]
    assert sorted(written) == sorted(table.__name__ for table in TABLES)
    assert set(sentences()) == {reason.template for table in TABLES for reason in table}


def test_ids_are_unique() -> None:
    ids = [reason.id for table in TABLES for reason in table]
    assert len(set(ids)) == len(ids)


def test_no_two_reasons_of_a_table_say_the_same() -> None:
    for table in TABLES:
        assert len(table.__members__) == len(list(table)), f"{table.__name__} has a sentence twice"


def test_whatever_refuses_names_a_reason_of_a_table_and_its_fields() -> None:
    tables = {table.__name__: table for table in TABLES}
    for place, call in refusals():
        if place.startswith("graph/reasons.py"):
            continue
        reason = call.args[0]
        assert isinstance(reason, ast.Attribute), f"{place}: a sentence that stands in no table"
        assert isinstance(reason.value, ast.Name), place
        table = tables[reason.value.id]
        assert reason.attr in table.__members__, f"{place}: {table.__name__} has no {reason.attr}"
        keywords = {keyword.arg for keyword in call.keywords} - {"node"}
        assert keywords == fields(table[reason.attr]), f"{place}: fields {keywords} of {table[reason.attr].value!r}"


LAYERS = ("graph", "ir", "rules", "analysis", "canonicalize", "legality", "rewrite", "deferred")  # those that decide
TAKES_A_REASON = ("Decision", "Finding", "note", "HeadRecord", "Escape", "refuse", "Refusal", "Unread", "build_now")
FOR_PEOPLE = {"analysis/cost.py"}  # what computes a head, and how


def is_sentence(node: ast.AST) -> bool:
    parts = node.values if isinstance(node, ast.JoinedStr) else [node]
    texts = [part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)]
    return sum(text.count(" ") for text in texts) > 2


def given_texts(tree: ast.AST) -> Iterator[ast.AST]:
    """The sentences that functions return, or give to what takes a reason."""
    for node in ast.walk(tree):
        values: list[ast.AST | None] = []
        if isinstance(node, ast.Return) or (isinstance(node, ast.keyword) and node.arg == "reason"):
            values = [node.value]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rsplit(".", 1)[-1] in TAKES_A_REASON:
            values = [*node.args]
        for value in values:
            options = [value.body, value.orelse] if isinstance(value, ast.IfExp) else [value]
            options = [each for x in options for each in (x.values if isinstance(x, ast.BoolOp) else [x])]
            yield from (each for each in options if each is not None and is_sentence(each))


def test_no_layer_that_decides_gives_a_sentence_that_is_no_reason() -> None:
    results = []
    for file in (file for layer in LAYERS for file in sorted((PACKAGE / layer).rglob("*.py"))):
        place = str(file.relative_to(PACKAGE))
        if place not in FOR_PEOPLE:
            results += [f"{place}:{x.lineno}" for x in given_texts(ast.parse(file.read_text(encoding="utf-8")))]  # type: ignore
    assert not results, f"sentences that stand in no table of reasons: {', '.join(results)}"


def test_every_reason_is_given_somewhere() -> None:
    reasons = {ast.unparse(call.args[0]) for _, call in refusals()}
    source = "\n".join(file.read_text(encoding="utf-8") for file in PACKAGE.rglob("*.py"))
    unused = [
        str(reason) for table in TABLES for reason in table if str(reason) not in reasons and str(reason) not in source
    ]
    assert not unused, f"reasons that nothing gives: {', '.join(unused)}"


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.__name__)
def test_a_refusal_has_its_id_and_its_sentence_filled_in(table: type[Reason]) -> None:
    for reason in table:
        refusal = refuse(reason, **dict.fromkeys(fields(reason), 7))
        assert refusal.id == reason.id
        assert re.sub(r"7(\.0+)?", "…", str(refusal)) == reason.template
