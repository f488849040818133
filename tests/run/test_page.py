"""The page of a run: what it says of a head, from its record alone."""

from __future__ import annotations

from dataclasses import replace

from fusedhead.report.estimates import worth
from fusedhead.report.html import page
from fusedhead.report.report import HeadRecord, Report
from fusedhead.report.summary import Summary

ENGINE = "torch windows: gradients in the forward sweep"
FUSED = HeadRecord(
    fused=True, reason="", where="model.py:7", computes="cross_entropy(mean)", tokens=1024, hidden_size=64,
    vocab_size=32768, logits="never built", engine=ENGINE, bytes_logits=128 << 20, workspace_bytes=25 << 19,
    dtype="float32", device="cpu", source='  File "model.py", line 7\n    z = head(h)',
)  # fmt: skip
LEFT = replace(FUSED, fused=False, reason="the <loss> is odd", computes="", logits="built", engine="")


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


def test_every_number_of_bytes_is_the_records_own() -> None:
    assert FUSED.bytes_saved == worth(FUSED).bytes_unfused - worth(FUSED).bytes_left
    assert "115.5 MiB saved" in str(FUSED)
    assert FUSED.how == f"{ENGINE}; 12.5 MiB of workspace"


def test_memory_that_grows_is_said() -> None:
    grown = replace(FUSED, bytes_logits=10 << 20)
    assert grown.bytes_saved == -(5 << 19)
    assert "-2.5 MiB saved" in str(grown)
    assert "-2.5 MiB" in written(grown)
