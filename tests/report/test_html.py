"""HTML of heads: the table of a notebook, and numbers as people read them."""

from __future__ import annotations

import pytest

from fusedhead.report.html import cards, quantity, sentence, size
from fusedhead.report.report import Report
from tests.report.heads import LEFT, head


def test_a_notebook_shows_the_table_with_reasons_escaped() -> None:
    shown = Report(graphs=1, heads=[head(), head(LEFT)])._repr_html_()
    assert "the &lt;loss&gt; is odd" in shown
    assert shown.count("<tr>") == 3
    assert "1 head fused, 1 left, in 1 graph" in shown
    assert "no projection with a loss" in Report(graphs=1)._repr_html_()


def test_a_card_has_the_programs_lines_without_markers_and_the_left_heads_come_first() -> None:
    source = '  File "model.py", line 7\n    z = head(h)\n        ^^^^^^^'
    first, second = cards([head(source=source), head(LEFT)])
    assert (first.number, first.head.fused, second.head.fused) == (1, False, True)
    assert second.source == 'File "model.py", line 7\n  z = head(h)'


@pytest.mark.parametrize(
    ("count", "text"), [(7, "7 B"), (1536, "1.5 KiB"), (3 << 29, "1.5 GiB"), (1 << 50, "1,024.0 TiB")]
)
def test_bytes_are_shown_in_the_largest_unit_that_they_fill(count: int, text: str) -> None:
    assert size(count) == text


def test_numbers_have_prefixes_and_sentences_end() -> None:
    assert (quantity(7), quantity(1.2e12)) == ("7.0 ", "1.2 T")
    assert (sentence("it is left"), sentence("it is left.")) == ("it is left.", "it is left.")
