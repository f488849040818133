"""The README names every option and its variable, and no other; its table of what is fused is the code's."""

from __future__ import annotations

import re
from pathlib import Path

from fusedhead.options import ENVIRONMENT, PREFIX, READERS
from fusedhead.report.coverage import MARKERS, PARTS, between_markers, overloads, sentences, table
from fusedhead.rules import RULES

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def test_the_options_of_the_readme_are_the_backends() -> None:
    assert set(re.findall(rf"^\| `{re.escape(PREFIX)}(\w+)` \|", README, re.MULTILINE)) == set(READERS)


def test_the_variables_of_the_readme_are_the_backends() -> None:
    assert set(re.findall(rf"\| `{ENVIRONMENT}(\w+)` \|", README)) == {name.upper() for name in READERS}


def test_the_table_of_what_is_fused_is_what_the_code_says() -> None:
    assert between_markers(README, MARKERS, table()) == README, "python -m fusedhead.rules --write README.md"


def test_every_rule_is_in_the_table() -> None:
    assert set(RULES) == {target for part in PARTS for target in overloads(part)} & set(RULES)


def test_the_reasons_are_sentences() -> None:
    found = sentences()
    assert len(found) > 50
    assert all(text == text.strip() and not text.endswith(".") for text in found)
