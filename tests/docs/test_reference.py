"""The reference names every option and its variable, and no other; its table of what is fused is the code's."""

from __future__ import annotations

import re
from pathlib import Path

from fusedhead.options import ENVIRONMENT, PREFIX, READERS
from fusedhead.report.coverage import PARTS, overloads, renewed, sentences
from fusedhead.rules import RULES

REFERENCE = Path(__file__).parents[2] / "docs" / "reference"
OPTIONS = (REFERENCE / "options.md").read_text(encoding="utf-8")


def test_the_options_of_the_reference_are_the_backends() -> None:
    assert set(re.findall(rf"^\| `{re.escape(PREFIX)}(\w+)` \|", OPTIONS, re.MULTILINE)) == set(READERS)


def test_the_variables_of_the_reference_are_the_backends() -> None:
    assert set(re.findall(rf"\| `{ENVIRONMENT}(\w+)` \|", OPTIONS)) == {name.upper() for name in READERS}


def test_the_table_of_what_is_fused_is_what_the_code_says() -> None:
    page = (REFERENCE / "rules.md").read_text(encoding="utf-8")
    assert renewed(page) == page, "python -m fusedhead.rules --write docs/reference/rules.md"


def test_every_rule_is_in_the_table() -> None:
    assert set(RULES) == {target for part in PARTS for target in overloads(part)} & set(RULES)


def test_the_reasons_are_sentences() -> None:
    result = sentences()
    assert len(result) > 50
    assert all(text == text.strip() and not text.endswith(".") for text in result)
