"""The summary of a program: one record a head and outcome, whatever the graphs, shapes and threads that compiled it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from fusedhead.report.report import Report
from fusedhead.report.summary import NO_GRAPH, NO_HEAD, Summary, spans
from tests.report.heads import head


def report(*heads) -> Report:
    return Report(graphs=1, milliseconds=2.0, heads=list(heads), before="x", after="y")


def test_graphs_of_one_head_are_one_line_with_all_token_counts() -> None:
    summary = Summary()
    for tokens in (16, 64, 32):
        summary.add(report(head(tokens=tokens, bytes_logits=tokens)))
    (one,) = summary.heads()
    assert (one.tokens, one.bytes_logits) == ("16-64", 64)
    assert (summary.graphs, summary.seconds) == (3, pytest.approx(6e-3))


def test_a_head_that_was_fused_and_left_has_a_line_for_each_the_fused_first() -> None:
    summary = Summary()
    summary.add(report(head(fused=False, reason="why", logits="built", engine="")))
    summary.add(report(head()))
    assert [one.fused for one in summary.heads()] == [True, False]


def test_texts_of_graphs_are_dropped_unless_they_are_kept() -> None:
    for keep in (False, True):
        summary = Summary(keep_graphs=keep)
        summary.add(report(head()))
        assert [(r.before, r.after) for r in summary.reports] == [("x", "y") if keep else ("", "")]


def test_a_program_without_graphs_and_one_without_heads_say_so() -> None:
    summary = Summary()
    assert NO_GRAPH.split(":")[0] in str(summary)
    summary.add(report())
    assert NO_HEAD in " ".join(str(summary).split())


def test_threads_lose_no_report() -> None:
    summary = Summary()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: summary.add(report(head())), range(200)))
    assert summary.graphs == 200


@pytest.mark.parametrize(
    ("counts", "text"),
    [([16], 16), ([16, 16], 16), ([64, 16], "16-64"), (["s0", 8], "8, s0"), (["s1", "s0"], "s0, s1")],
)
def test_token_counts_are_spans_and_names(counts: list[int | str], text: int | str) -> None:
    assert spans(counts) == text
