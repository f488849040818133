"""The report in a terminal: left heads first, one line a head, 80 columns, one number of bytes that is no sum."""

from __future__ import annotations

import importlib.util
import io
import json

import expecttest
import hypothesis.strategies as st
import pytest
from hypothesis import given

from fusedhead.graph.run_counts import Use
from fusedhead.report import terminal
from fusedhead.report.report import Report
from fusedhead.report.summary import Summary
from tests.report.heads import FUSED, LEFT, head, heads


def report(*records) -> Report:
    """Of one graph."""
    graph_report = Report(graphs=1, milliseconds=12.0, heads=list(records))
    for record in records:
        record.run.graph = graph_report.run
    return graph_report


class Golden(expecttest.TestCase):
    maxDiff = None

    def test_what_was_left_comes_first(self) -> None:
        written = head(module="b", where="model.py:8 (b)", logits="deferred")
        written.run.answered.add()
        written.run.deferred.add()
        written.run.built.add(Use("svd", "train.py:77"))
        self.assertExpectedInline(
            terminal.text(report(head(), written, head(LEFT)).overview(), 80),
            """\
fusedhead: 2 heads fused, 1 left, in 1 graph (12 ms in the pass)
  115.5 MiB less held for logits at the peak of a step (an estimate from the
  sizes)
  128.0 MiB of logits are built for heads that were left

         head                          N x D x V  answered  built          saved
  left   aux                   1024 x 64 x 32768         -      -              -
         because the <loss> is odd
         model.py:9 (aux)
  fused  b                     1024 x 64 x 32768         1      1        0.0 MiB
         built once for svd at train.py:77
         logits built once of 1; torch windows: gradients in the forward sweep
         model.py:8 (b): cross_entropy(mean)
  fused  lm_head               1024 x 64 x 32768         -      -      115.5 MiB
         logits never built; torch windows: gradients in the forward sweep; 12.5
         MiB of workspace
         model.py:7 (lm_head): cross_entropy(mean)""",
        )


def test_many_heads_of_one_kind_take_a_line_each_and_are_told_of_together() -> None:
    lines = terminal.text(report(*heads(31)).overview()).splitlines()
    named = [line.split()[1] for line in lines if line.startswith("  fused")]
    assert named == [f"heads.{i}" for i in range(31)]  # 9 before 10
    assert len(lines) < 31 + 8
    assert lines[-1].endswith("and 28 more: cross_entropy(mean)")


def test_bytes_are_those_of_the_graph_that_saves_most_and_no_sum_over_graphs() -> None:
    summary = Summary()
    for tokens in (512, 1024):  # training and evaluation do not run at once
        saved = tokens << 10
        summary.add(Report(graphs=1, heads=[head(tokens=tokens, bytes_logits=saved + 7, workspace_bytes=7)]))
    assert summary.overview().saved == 1024 << 10
    assert "1.0 MiB less held for logits" in str(summary)


def test_bytes_of_one_graph_are_net() -> None:
    both = report(head(), head(bytes_logits=10 << 20))  # the second holds 2.5 MiB more than it saves
    assert both.overview().saved == FUSED.bytes_saved - (5 << 19)
    grown = report(head(bytes_logits=10 << 20))
    assert grown.to_dict()["bytes_saved"] == -(5 << 19)
    assert "2.5 MiB more held for logits" in str(grown)


def test_a_report_of_nothing_says_so() -> None:
    assert "no projection with a loss" in str(Report(graphs=1))
    assert "never ran a torch.compile" in str(Summary())


def test_repr_is_short_and_data_is_json() -> None:
    both = report(head(), head(LEFT))
    assert repr(both) == "<fusedhead.Report: 1 head fused, 1 left, in 1 graph>"
    data = json.loads(json.dumps(both.to_dict()))
    assert [one["module"] for one in data["heads"]] == ["aux", "lm_head"]
    assert (data["heads_fused"], data["heads_left"], data["bytes_built"]) == (1, 1, 128 << 20)
    assert data["heads"][1]["counts"]["built"] == {}


@given(
    module=st.text(st.characters(codec="ascii", categories=["L", "N"], include_characters="._"), max_size=90),
    sizes=st.tuples(*(st.integers(1, 10**7) for _ in range(3))),
    gib=st.integers(0, 900),
    fused=st.booleans(),
)
def test_a_line_of_the_table_fits_80_columns(module: str, sizes: tuple[int, int, int], gib: int, fused: bool) -> None:
    tokens, hidden, vocab = sizes
    one = head(
        FUSED if fused else LEFT, module=module, tokens=tokens, hidden_size=hidden, vocab_size=vocab,
        bytes_logits=gib << 30, workspace_bytes=0,
    )  # fmt: skip
    assert len("  " + terminal.row(one)) <= 80


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("rich", [True, False])
def test_a_terminal_gets_the_same_text_with_and_without_rich(rich: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if rich and importlib.util.find_spec("rich") is None:
        rich = False  # plain is all there is
    monkeypatch.setattr(terminal, "columns", lambda file: 80)
    monkeypatch.delenv("NO_COLOR", raising=False)
    if not rich:
        monkeypatch.setitem(__import__("sys").modules, "rich.console", None)
    file = Terminal()
    overview = report(head(), head(LEFT), *heads(3)).overview()
    terminal.show(overview, file)
    shown = file.getvalue()
    if rich:
        from rich.text import Text

        shown = Text.from_ansi(shown).plain
    assert shown.rstrip() == terminal.text(overview, 80)


def test_rich_prints_a_report() -> None:
    if importlib.util.find_spec("rich") is not None:
        assert report(head()).__rich__().plain.rstrip() == terminal.text(report(head()).overview())
