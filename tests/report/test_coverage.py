"""The table of what is fused, and the list of reasons: they are the code's, and the reference has them."""

from __future__ import annotations

from pathlib import Path

from fusedhead.report.coverage import PARTS, overloads, renewed, sentences
from fusedhead.rules import RULES

REFERENCE = Path(__file__).parents[2] / "docs" / "reference"


def test_the_table_of_what_is_fused_is_what_the_code_says() -> None:
    page = (REFERENCE / "rules.md").read_text(encoding="utf-8")
    assert renewed(page) == page, "python -m fusedhead.rules --write docs/reference/rules.md"


def test_every_rule_is_in_the_table() -> None:
    assert set(RULES) == {target for part in PARTS for target in overloads(part)} & set(RULES)


def test_the_reasons_are_sentences() -> None:
    result = sentences()
    assert len(result) > 50
    assert all(text == text.strip() and not text.endswith(".") for text in result)
