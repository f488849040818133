"""A body: which graphs of a module are run by what, in which grad mode, and what the report is told of products."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fusedhead.analysis.body import Body, graph_uses
from fusedhead.analysis.reasons import NotInForward
from fusedhead.compat import set_grad_enabled
from fusedhead.options import Options
from tests.graph.dynamo import dynamo_graph, node_called

CHECKPOINT = "tag_activation_checkpoint"


def checkpointed(x: Tensor) -> Tensor:
    return checkpoint(torch.sin, x, use_reentrant=False).sum()


def test_a_graph_and_those_that_its_nodes_run_are_used_once_each() -> None:
    gm = dynamo_graph(checkpointed, torch.ones(3, requires_grad=True))
    whole, inner = graph_uses(gm)
    assert (whole.module, whole.owner, whole.grad, whole.calls) == (gm, "", True, ())
    assert (inner.owner, inner.grad, inner.calls) == (CHECKPOINT, True, (node_called(gm, CHECKPOINT),))


def test_a_graph_that_is_run_in_both_modes_has_none_of_them() -> None:
    gm = dynamo_graph(checkpointed, torch.ones(3, requires_grad=True))
    call = node_called(gm, CHECKPOINT)
    with gm.graph.inserting_before(call.next):
        gm.graph.call_function(set_grad_enabled, (False,))
        again = gm.graph.node_copy(call, lambda node: node)
    inner = graph_uses(gm)[1]
    assert inner.grad is None
    assert inner.calls == (call, again)


def test_gradients_are_not_computed_in_the_forward_of_a_graph_that_runs_again_or_in_both_modes() -> None:
    graph = torch.fx.Graph()
    reasons = {
        (owner, grad): getattr(Body(graph, Options(), owner, grad).recomputes, "reason", None)
        for owner in ("", CHECKPOINT)
        for grad in (True, None)
    }
    assert reasons == {
        ("", True): None,
        ("", None): NotInForward.BOTH_MODES,
        (CHECKPOINT, True): NotInForward.CHECKPOINTED,
        (CHECKPOINT, None): NotInForward.CHECKPOINTED,
    }


def test_edits_of_nodes_are_counted_and_products_of_numbers_are_not_noted() -> None:
    gm = dynamo_graph(lambda h, w: F.linear(h, w).sum() * 2, torch.ones(3, 4), torch.ones(5, 4))
    body = Body(gm.graph, Options())
    product, total = node_called(gm, "linear"), node_called(gm, "mul")
    body.edited(product, total)
    body.note(product, None)
    body.note(total, None)
    assert body.edits == 2
    assert [finding.node for finding in body.findings] == [product]
