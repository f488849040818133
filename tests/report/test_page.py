"""The page of a run: what it says of a head, from its record alone."""

from __future__ import annotations

import re
from dataclasses import replace

from fusedhead.report.estimates import worth
from fusedhead.report.head_record import HeadRecord
from fusedhead.report.page import page
from fusedhead.report.report import Report
from fusedhead.report.summary import Summary
from tests.report.heads import FUSED, LEFT, head, heads


def written(*heads: HeadRecord) -> str:
    summary = Summary()
    summary.add(Report(graphs=1, before="a\nb", after="a\nc", heads=list(heads)))
    return page(summary, "train.py")


def test_a_fused_head_is_worth_its_logits_less_its_workspace() -> None:
    estimated = worth(FUSED)
    assert (estimated.bytes_unfused, estimated.bytes_left) == (128 << 20, int(12.5 * 2**20))
    text = written(FUSED)
    assert "115.5 MiB" in text
    assert "12.5 MiB" in text


def test_logits_that_stay_save_nothing() -> None:
    assert worth(LEFT).bytes_left == worth(LEFT).bytes_unfused == 128 << 20
    assert worth(LEFT).traffic == 0


def test_a_head_that_is_left_shows_its_reason_its_line_and_no_empty_fields() -> None:
    text = written(LEFT)
    assert "the &lt;loss&gt; is odd." in text
    assert "line 7" in text
    assert "<dd></dd>" not in text


def test_a_head_of_unknown_size_has_no_bars() -> None:
    assert "class=bars" not in written(replace(LEFT, bytes_logits=0, dtype="", device=""))


def test_memory_that_grows_is_said() -> None:
    grown = replace(FUSED, bytes_logits=10 << 20)
    assert grown.bytes_saved == -(5 << 19)
    assert "-2.5 MiB saved" in str(grown)
    assert "-2.5 MiB" in written(grown)


def test_the_table_of_all_heads_comes_first_and_leads_to_every_card() -> None:
    text = written(*heads(30), LEFT)
    index, cards = text.index("<table id=index>"), text.index("<article")
    assert index < cards
    assert re.findall(r'<a href="#(head-\d+)">', text) == re.findall(r'<article class="card \w+" id="(head-\d+)"', text)
    assert re.findall(r'<a href="#head-\d+">([\w.]+)', text)[:3] == ["aux", "heads.0", "heads.1"]
    assert "128.0 MiB of logits built" in text


def test_all_bars_have_one_scale() -> None:
    text = written(head(bytes_logits=100 << 20), head(bytes_logits=25 << 20, where="model.py:8 (half)", module="half"))
    widths = [float(width) for width in re.findall(r'class=without style="width:([\d.]+)%"', text)]
    assert sorted(widths) == [25.0, 100.0]


def test_versions_and_date_are_on_the_page_and_nothing_is_fetched() -> None:
    text = written(FUSED)
    assert re.search(r"fusedhead \d.* torch \d.* Python 3\..*\d{4}-\d\d-\d\dT", text)
    assert not re.search(r"<link|<img|src=|https?:|@import|url\(", text)
