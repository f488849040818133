"""The catalogue of forms and traps is complete, and every test it names exists; so is that of the README's refusals."""

from __future__ import annotations

import ast
from pathlib import Path

from fusedhead.report.coverage import PARTS
from tests.programs.traps.catalogue import FORMS, TRAPS
from tests.programs.traps.promises import LEFT

TESTS = Path(__file__).parents[2]


def names_of_tests() -> set[str]:
    return {
        node.name
        for file in TESTS.rglob("test_*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def test_every_form_and_every_trap_is_held_by_a_test_that_exists() -> None:
    names, held = names_of_tests(), [*FORMS.items(), *TRAPS.items(), *LEFT.items()]
    missing = {name: set(tests) - names for name, tests in held}
    assert not {name: tests for name, tests in missing.items() if tests}
    assert not [name for name, tests in held if not tests]


def test_the_catalogue_is_complete() -> None:
    assert len(FORMS) == 20
    assert len(TRAPS) == 65


def test_every_refusal_that_the_readme_promises_is_held() -> None:
    promised = [clause for part in PARTS for clause in part.row.left.split("; ") if clause]
    assert promised == list(LEFT)
