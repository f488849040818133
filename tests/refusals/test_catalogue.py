"""The catalogue of forms and traps is complete, and every test it names exists."""

from __future__ import annotations

import ast
from pathlib import Path

from tests.refusals.catalogue import FORMS, TRAPS

TESTS = Path(__file__).parents[1]


def names_of_tests() -> set[str]:
    return {
        node.name
        for file in TESTS.rglob("test_*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def test_every_form_and_every_trap_is_held_by_a_test_that_exists() -> None:
    known = names_of_tests()
    missing = {name: set(tests) - known for name, tests in [*FORMS.items(), *TRAPS.items()]}
    assert not {name: tests for name, tests in missing.items() if tests}
    assert not [name for name, tests in [*FORMS.items(), *TRAPS.items()] if not tests]


def test_the_catalogue_is_complete() -> None:
    assert len(FORMS) == 20
    assert len(TRAPS) == 65
