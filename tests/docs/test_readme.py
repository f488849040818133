"""README.md stays short, its picture shows the committed results, and a package index can show it."""

from __future__ import annotations

import re

import pytest

from benchmarks import readme_plot
from setup import for_an_index
from tests.docs.blocks import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def test_it_is_a_screen_and_a_half() -> None:
    assert len(README.splitlines()) < 160
    assert max(map(len, README.splitlines())) < 400


def test_the_picture_is_drawn_from_the_committed_results() -> None:
    assert readme_plot.PICTURE.read_text(encoding="utf-8") == readme_plot.picture(), "python -m benchmarks.readme_plot"


def test_every_link_leads_to_a_file() -> None:
    for link in LINK.findall(README):
        assert (ROOT / link.partition("#")[0]).exists(), link


def test_an_index_is_shown_no_link_that_leads_nowhere() -> None:
    shown = for_an_index(README)
    assert LINK.search(README)
    assert not [link for link in LINK.findall(shown) if not link.startswith(("https://", "#"))]
    assert "[results]" not in shown
    assert "results." in shown


def test_with_a_repository_an_index_links_to_this_version_s_files() -> None:
    shown = for_an_index(README, "https://example.org/f", "1.2")
    assert "](https://example.org/f/raw/v1.2/docs/images/vocab.svg)" in shown
    assert "](https://example.org/f/blob/v1.2/docs/benchmarks/results.md)" in shown


@pytest.mark.parametrize("code", ["`x[i](y)`", "```python\nf[a](b)\n```\n"])
def test_code_that_looks_like_a_link_is_left_alone(code: str) -> None:
    assert for_an_index(code) == code
