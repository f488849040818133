"""The pipeline: its passes by name and in order, what is counted and shown of each, and what one more pass takes."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor

import fusedhead
from fusedhead import Report, compat, pipeline
from fusedhead.analysis.body import Body
from fusedhead.backend import compile_graph
from fusedhead.graph.edit import replace_node
from fusedhead.graph.nodes import fake, name_of
from fusedhead.inductor.config import POST_GRAD
from fusedhead.options import Options, split_options
from fusedhead.pipeline import Pass
from tests.eager_stack import Rewritten, as_it_is
from tests.programs.claims import D, hidden, labels, weight

LISTS = ("MODULE_PASSES", "CANONICALIZE", "ANALYZE", "DECIDE", "REWRITE")


def loss(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(h, w), y)


def test_the_passes_and_their_order() -> None:
    lines = []
    for name in LISTS:
        lines.append(name)
        for each in getattr(pipeline, name):
            marks = (" (speculative)" if each.speculative else "") + f" {each.where.__name__}"
            lines.append(f"  {each.name}{marks.removesuffix(' anywhere')}")
    lines += ["POST_GRAD", *(f"  {name}" for name, _ in POST_GRAD)]
    assert_expected_inline(
        "\n".join(lines),
        """\
MODULE_PASSES
  inline-regions
  inline-checkpoints (speculative)
CANONICALIZE
  localize-shards
  expand-broadcasts
  functionalize-accumulation
  functionalize-subscripts
  expand-soft-labels
  deduplicate-weights
  merge-chunks
  duplicate-transposed (speculative)
  unstack-heads top
  find-returned-stacks deferring_top
  redirect-returned-stacks deferring_top
ANALYZE
  find-projections
  interpret
  missed-heads
DECIDE
  find-token-programs
  legality
  profitability
  sharded-weights
  joint-decisions
  other-products top
REWRITE
  note-lines
  redirect-returned-logits
  count-tokens-elsewhere
  emit-token-programs
  emit-statistics
  gradients-in-forward
  limit-small-calls
  find-grown-heads
  find-heads-left-in-shards
  order-collectives
POST_GRAD
  scale-gradients-in-place
  call-below-autograd""",
    )


def test_the_passes_of_each_graph_are_the_lists_in_order() -> None:
    assert tuple(each for name in LISTS[1:] for each in getattr(pipeline, name)) == pipeline.BODY_PASSES
    names = [each.name for each in (*pipeline.MODULE_PASSES, *pipeline.BODY_PASSES)]
    assert len(set(names)) == len(names)


def test_a_report_has_the_edits_and_the_time_of_each_pass() -> None:
    rewritten = Rewritten(loss)
    rewritten(hidden(6, D), weight(), labels(6))
    edits = {name: count for name, count, _ in rewritten.report.passes}
    assert list(edits) == [each.name for each in (*pipeline.MODULE_PASSES, *pipeline.BODY_PASSES)]
    assert {name for name, count in edits.items() if count} == {"emit-statistics", "gradients-in-forward"}
    assert all(milliseconds >= 0 for *_, milliseconds in rewritten.report.passes)


def test_explain_prints_the_table_of_passes_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_inductor(gm: Any, inputs: Any, mode: Any, options: Any, observe: Callable[[Report], None]) -> Any:
        return compile_graph(gm, inputs, split_options(options)[0], as_it_is, observe)

    monkeypatch.setattr(sys.modules["fusedhead.explain"], "compile_with", without_inductor)
    inputs = hidden(6, D), weight(), labels(6)
    shown = str(fusedhead.explain(loss, passes=True)(*inputs)).splitlines()
    at = shown.index("pass                       | edits |       ms")
    names = [each.name for each in (*pipeline.MODULE_PASSES, *pipeline.BODY_PASSES)]
    assert [line.split(" ")[0] for line in shown[at + 1 :]] == names
    assert "| edits |" not in str(fusedhead.explain(loss)(*inputs))


def test_the_log_has_the_graph_after_each_pass_that_changed_it(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "fusedhead"):
        Rewritten(loss)(hidden(6, D), weight(), labels(6))
    after = [r.getMessage() for r in caplog.records if r.getMessage().startswith("after ")]
    assert [text.split(" ")[1] for text in after] == ["emit-statistics", "gradients-in-forward"]
    assert "fusedhead.head_stats" in after[0]
    assert "fusedhead.head_loss" in after[1]


def test_the_structured_trace_has_the_graph_after_each_pass_that_changed_it(monkeypatch: pytest.MonkeyPatch) -> None:
    artifacts: dict[str, str] = {}
    monkeypatch.setattr(compat, "trace_handlers", lambda: [logging.NullHandler()])
    monkeypatch.setattr(compat, "trace_artifact", lambda name, text: artifacts.update({name: text()}))
    Rewritten(loss)(hidden(6, D), weight(), labels(6))
    assert list(artifacts)[:2] == ["fusedhead_after_emit-statistics", "fusedhead_after_gradients-in-forward"]
    assert "fusedhead.head_stats" in artifacts["fusedhead_after_emit-statistics"]


def drop_scale_by_one(body: Body) -> None:
    """A pass of ten lines: ``x * 1`` is x."""
    for node in body.graph.nodes:
        if name_of(node) == "mul" and node.args[1:] == (1,) and fake(node).dtype == fake(node.args[0]).dtype:
            replace_node(node, node.args[0])  # type: ignore[arg-type]


def test_a_pass_of_ten_lines_is_one_more_line_in_a_list(monkeypatch: pytest.MonkeyPatch) -> None:
    def scaled(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(h, w) * 1, y)

    monkeypatch.setattr(pipeline, "BODY_PASSES", (Pass("drop-scale-by-one", drop_scale_by_one), *pipeline.BODY_PASSES))
    rewritten, inputs = Rewritten(scaled), (hidden(6, D), weight(), labels(6))
    torch.testing.assert_close(rewritten(*inputs), scaled(*inputs))
    assert [each.edits for each in rewritten.report.passes if each.name == "drop-scale-by-one"] == [1]
    assert " mul: " in rewritten.report.before
    assert " mul: " not in rewritten.report.after
    assert all(head.fused for head in rewritten.report.heads)


def both_ways(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    z = h @ w.t()
    return F.cross_entropy(z, y) + F.cross_entropy(z.t(), y)


def test_a_speculative_pass_whose_product_is_still_computed_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    attempts: list[tuple[bool, bool]] = []
    run = pipeline.Attempt.run

    def noted(self: pipeline.Attempt, show: Any) -> None:
        run(self, show)
        attempts.append((self.speculate, self.speculation_failed))

    monkeypatch.setattr(pipeline.Attempt, "run", noted)
    inputs = hidden(8, D), weight(8, D), labels(8, high=8)
    Rewritten(both_ways)(*inputs)
    assert attempts == [(True, False)]
    attempts.clear()

    def returned(h: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        z = h @ w.t()
        return F.cross_entropy(z, y) + F.cross_entropy(z.t(), y), z.cumsum(0).sum(1)

    rewritten = Rewritten(returned)
    torch.testing.assert_close(rewritten(*inputs), returned(*inputs))
    assert attempts == [(True, True), (False, False)]
    assert "duplicate-transposed" not in {each.name for each in rewritten.report.passes}


def test_a_pass_that_changes_nothing_keeps_the_facts_and_an_edit_drops_them() -> None:
    gm = torch.fx.symbolic_trace(lambda x: (x + 1).relu())
    body = Body(gm.graph, Options())
    position = body.facts.position
    pipeline.run_passes([Pass("nothing", lambda body: None)], body)
    assert body.facts.position is position

    def add_a_node(body: Body) -> None:
        with body.graph.inserting_before(body.graph.output_node()):
            body.graph.call_function(torch.neg, (next(iter(body.graph.nodes)),))

    pipeline.run_passes([Pass("one", add_a_node)], body)
    assert len(body.facts.position) == len(position) + 1
    body.facts.keep(next(iter(gm.graph.nodes)))
    kept = body.facts.position
    pipeline.run_passes([Pass("another", add_a_node)], body)
    assert body.facts.position is kept
