"""The record of a head: its bytes, and how often its logits were answered, built and handed on."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fusedhead.report.estimates import worth
from tests.eager_stack import Rewritten
from tests.report.heads import ENGINE, FUSED, LEAF, logits, only, operands


def test_every_number_of_bytes_is_the_records_own() -> None:
    assert FUSED.bytes_saved == worth(FUSED).bytes_unfused - worth(FUSED).bytes_left
    assert "115.5 MiB saved" in str(FUSED)
    assert FUSED.how == f"{ENGINE}; 12.5 MiB of workspace"


def test_losses_outside_are_counted_and_the_logits_stay_unbuilt() -> None:
    rewritten = Rewritten(logits)
    for _ in range(3):
        h, w, y = operands()
        loss = F.cross_entropy(rewritten(h, w), y)
        torch.testing.assert_close(loss, F.cross_entropy(F.linear(h, w), y))
    head = only(rewritten)
    assert (head.told(), head.remarks()) == ("deferred, never built", ["answered 3 times"])
    assert head.bytes_saved == head.bytes_logits - head.workspace_bytes


def test_each_use_is_told_apart() -> None:
    rewritten = Rewritten(logits)
    for _ in range(2):
        rewritten(*operands()[:2]).sin()
    torch.linalg.svdvals(rewritten(*operands()[:2]))
    remarks = only(rewritten).remarks()
    names = [remark.split(" at ")[0] for remark in remarks]
    assert names == ["built 2 times for sin", "built once for linalg_svdvals"]
    assert only(rewritten).told() == "built 3 times of 3"


@LEAF
def test_logits_handed_to_another_compiled_function_are_counted() -> None:
    rewritten, losses = Rewritten(logits), Rewritten(F.cross_entropy)
    h, w, y = operands()
    torch.testing.assert_close(losses(rewritten(h, w), y), F.cross_entropy(F.linear(h, w), y))
    assert only(rewritten).remarks() == ["handed to another compiled function once"]
    assert only(losses).fused
