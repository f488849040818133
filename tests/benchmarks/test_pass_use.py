"""What no counted program needs has a reason in the notes."""

from __future__ import annotations

import re

from benchmarks.pass_use import all_rules
from fusedhead import pipeline
from tests.test_layers import ROOT

PAGE = (ROOT / "benchmarks/results/pass_use.md").read_text(encoding="utf-8")
TABLE = PAGE.partition("| rule refuses |")[0]  # a refusal is none that a program needs
COUNTS = {
    name: sum(map(int, counts.split("|")))
    for name, counts in re.findall(r"^\| ([\w.-]+) \| ([\d |]+) \|$", TABLE, re.M)
}
NOTES = (
    (ROOT / "benchmarks/NOTES.md").read_text(encoding="utf-8").partition("## What each pass and rule is kept for")[2]
)
REASONS = NOTES.partition("\n## ")[0]


def test_the_table_has_every_pass_and_rule() -> None:
    passes = [each.name for each in (*pipeline.MODULE_PASSES, *pipeline.BODY_PASSES)]
    assert {*passes, *all_rules()} <= set(COUNTS)


def test_every_pass_that_no_program_needs_has_a_reason() -> None:
    passes = [each.name for each in (*pipeline.MODULE_PASSES, *pipeline.BODY_PASSES)]
    assert [name for name in passes if not COUNTS[name] and f"`{name}`" not in REASONS] == []


def test_the_notes_count_the_rules_that_no_program_needs() -> None:
    unneeded = [name for name in all_rules() if not COUNTS[name]]
    assert f"the {len(unneeded)} rules that none of the three needs" in REASONS
