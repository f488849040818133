"""A bug anywhere in the pass costs the fusion and one warning, never the program: Inductor gets the graph as it was."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fusedhead import pipeline
from fusedhead.rules import RULES
from tests.deferred.heads import Model, deferring, is_deferred, tokens
from tests.eager_stack import Rewritten
from tests.programs.claims import D, hidden, labels, outcome, weight

aten = torch.ops.aten


def many_forms(h: Tensor, w: Tensor, v: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """Heads that a statistic gives, one token by token, stacked ones, and returned logits."""
    z = F.linear(h, w)
    pair = torch.stack([F.linear(h, v), F.linear(h, v * 2)], 1)
    divergence = F.kl_div(F.linear(h, w * 2).log_softmax(-1), F.linear(h, v).softmax(-1), reduction="batchmean")
    return F.cross_entropy(z, y), z, divergence, F.cross_entropy(pair[:, 0], y), pair


def given() -> list[Tensor]:
    return [hidden(6, D), weight(), weight(), labels(6)]


class Bug(Exception):
    pass


def buggy(*_: Any, **__: Any) -> Any:
    raise Bug("a surprise")


STAGES = [
    "pipeline:graph_uses", "pipeline:records_of", "pipeline:counting_edits",
    "analysis.strategies:candidates", "analysis.strategies:heads_without_loss", "analysis.strategies:interpret",
    "analysis.strategies:teacher_heads", "analysis.evaluator:applied", "analysis.interpreter:note_value",
    "analysis.interpreter:note_returned", "analysis.interpreter:note_overwritten",
    "analysis.token_regions:found_regions", "legality.profitability:gate", "legality.profitability:most",
    "legality.legality:illegal", "legality.legality:subclass",
    "legality.legality:functorch", "legality.other_products:output_products",
    "rewrite.returned_logits:recipe", "analysis.body:redirect", "rewrite.returned_logits:place",
    "rewrite.token_programs:emit_region", "rewrite.statistics:erase_unused", "rewrite.statistics:emit_sweeps",
    "rewrite.sweeps:groups", "rewrite.operands:emit_operands", "rewrite.statistics:rebuild_terminal",
    "rewrite.statistics:erase",
    "ir.builder:Emit.__call__", "rewrite.forward_gradients:price_of_statistics",
    "rewrite.forward_gradients:upgrade", "rewrite.forward_gradients:try_tail", "rewrite.forward_gradients:hoist",
    "rewrite.forward_gradients:replace_with_losses", "report.records:record_of_decision",
]  # fmt: skip


@pytest.fixture(scope="module")
def unharmed() -> None:
    """Every form of the program is fused, so that every stage has something to do."""
    rewritten = Rewritten(many_forms)
    outcome(rewritten, given())
    assert len(rewritten.report.heads) == 4
    assert all(head.fused for head in rewritten.report.heads)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_that_raises_leaves_the_graph_to_inductor(
    stage: str, unharmed: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    module, name = stage.split(":")
    path = name.split(".")
    owner: Any = importlib.import_module(f"fusedhead.{module}")
    for name in path[:-1]:
        owner = getattr(owner, name)
    assert callable(getattr(owner, path[-1]))
    monkeypatch.setattr(owner, path[-1], buggy)
    stepped_back(caplog)


@pytest.mark.parametrize("name", [each.name for each in (*pipeline.MODULE_PASSES, *pipeline.BODY_PASSES)])
def test_a_pass_that_raises_leaves_the_graph_to_inductor(
    name: str, unharmed: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for passes in ("MODULE_PASSES", "BODY_PASSES"):
        broken = [each._replace(run=buggy) if each.name == name else each for each in getattr(pipeline, passes)]
        monkeypatch.setattr(pipeline, passes, broken)
    stepped_back(caplog)


@pytest.mark.parametrize(
    "op",
    [aten.linear.default, aten.cross_entropy_loss.default, aten.log_softmax.int, aten.softmax.int],
)
def test_a_rule_that_raises_leaves_the_graph_to_inductor(
    op: Any, unharmed: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(RULES, op, buggy)
    stepped_back(caplog)


def stepped_back(caplog: pytest.LogCaptureFixture) -> None:
    inputs = given()
    expected = outcome(many_forms, inputs)
    rewritten = Rewritten(many_forms)
    with caplog.at_level(logging.WARNING, "fusedhead"):
        got = outcome(rewritten, inputs)
    torch.testing.assert_close(got, expected)
    (record,) = [r for r in caplog.records if r.name == "fusedhead"]
    assert record.levelname == "WARNING"
    assert "leaves it to Inductor (Bug: a surprise)" in record.getMessage()
    assert "Traceback" in record.getMessage()
    assert rewritten.report.errors == ["Bug: a surprise"]


def outside(forward: Callable[..., Any], x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(forward(x).view(-1, 1024), y.view(-1))


def test_a_rule_that_raises_outside_the_graph_costs_the_plain_logits(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, x, y = Model(), tokens(), tokens()
    forward = deferring(model)
    assert is_deferred(forward(x))
    monkeypatch.setitem(RULES, aten.cross_entropy_loss.default, buggy)
    expected = outside(model, x, y)
    with caplog.at_level(logging.WARNING, "fusedhead"):
        got = outside(forward, x, y)
        said = [r.getMessage() for r in caplog.records if r.name == "fusedhead"]
        outside(forward, x, y)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(
        torch.autograd.grad(got, model.lm_head.weight), torch.autograd.grad(expected, model.lm_head.weight)
    )
    assert len(set(said)) == 1
    assert "of deferred logits could not be read" in said[0]
    assert said == [r.getMessage() for r in caplog.records if r.name == "fusedhead"], "it is said again"
