"""The report says what happened: what was built, by which use, what was never run, and every head that could be one."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fusedhead
from fusedhead.report.report import Report
from fusedhead.report.summary import Summary
from tests.eager_stack import Rewritten, backend
from tests.report.heads import LEAF, N, V, logits, only, operands


def test_deferred_logits_that_are_built_are_built_in_the_report_with_the_use_and_its_line() -> None:
    rewritten = Rewritten(logits)
    h, w, _ = operands()
    z = rewritten(h, w)
    assert only(rewritten).told() == "deferred, never built"
    z[:, V - 1] += -1e6
    z = z - z.logsumexp(-1, keepdim=True)
    expected = F.linear(h, w).index_fill(1, torch.tensor([V - 1]), -1e6).log_softmax(-1)
    torch.testing.assert_close(z[:, :-1], expected[:, :-1])
    head = only(rewritten)
    assert head.materialised
    assert head.told() == "built once of 1"
    assert head.bytes_saved == 0
    (remark,) = (text for text in head.remarks() if text.startswith("built"))  # what was written is answered
    assert remark.startswith("built once for ")
    assert " at test_report.py:" in remark


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_report_can_be_copied_pickled_and_taken_apart(dynamic: bool) -> None:
    rewritten = Rewritten(logits, dynamic=dynamic)
    h, w, y = operands()
    F.cross_entropy(rewritten(h, w), y).backward()
    report = rewritten.report
    for other in (copy.copy(report), copy.deepcopy(report), pickle.loads(pickle.dumps(report))):
        assert str(other) == str(report)
        assert other.to_dict() == report.to_dict()
    assert asdict(report)["heads"][0]["where"] == report.heads[0].where


def fails(gm: Any, inputs: Any) -> Callable[..., Any]:
    raise RuntimeError("no compiler on this machine\nand more of it")


@pytest.mark.parametrize("program", [logits, lambda h, w: F.cross_entropy(F.linear(h, w), torch.zeros(N).long())])
@torch._dynamo.config.patch(suppress_errors=True)
def test_a_graph_that_failed_to_compile_has_fused_nothing(program: Callable[..., Tensor]) -> None:
    report = Report()
    h, w, _ = operands()
    compiled = torch.compile(program, backend=backend(report.extend, fails))
    torch.testing.assert_close(compiled(h, w), program(h, w))
    (head,) = report.heads
    assert (head.fused, head.bytes_saved, head.logits) == (False, 0, "built")
    assert "failed to compile (RuntimeError: no compiler on this machine); what ran instead ran eagerly" in head.reason
    assert "0 heads fused, 1 left" in str(report)


def test_a_graph_that_never_ran_has_fused_nothing() -> None:
    summary = Summary()

    def never(gm: Any, inputs: Any) -> Callable[..., Any]:
        backend(summary.add)(gm, inputs)
        return gm.forward

    torch.compile(logits, backend=never)(*operands()[:2])
    (head,) = summary.heads()
    assert (head.fused, head.reason) == (False, "its graph was compiled and never run")


@LEAF
def test_explain_counts_what_its_run_did() -> None:
    def looks(h: Tensor, w: Tensor) -> float:
        z = F.linear(h, w)
        torch._dynamo.graph_break()
        return z.sin().sum().item()

    (head, *_) = fusedhead.explain(looks)(*operands()[:2]).heads
    assert head.told() == "built once of 1" or "handed to another compiled function once" in head.remarks()
