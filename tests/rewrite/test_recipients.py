"""What takes the gradient of gathered hidden states follows their row steps; which sweeps in shards give it at once."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch.fx import Graph, Node

import fusedhead.lowering.token_shards  # noqa: F401  registers torch.ops.fusedhead
from fusedhead.analysis.reasons import NotInForward
from fusedhead.ir.builder import Emit
from fusedhead.rewrite import recipients, shard_sweeps

aten, OPS = torch.ops.aten, torch.ops.fusedhead


def of(graph: Graph, target: Any, *args: Any, **kwargs: Any) -> Node:
    """A node with the value that it computes."""
    node = graph.call_function(target, args, kwargs)
    values = torch.fx.node.map_arg(args, lambda n: n.meta["example_value"])
    node.meta["example_value"] = target(*values, **kwargs)
    return node


def given(graph: Graph, name: str, value: torch.Tensor) -> Node:
    node = graph.placeholder(name)
    node.meta["example_value"] = value
    return node


def gathered(group: str) -> tuple[Graph, Node, Node]:
    """Hidden states [2, 3, 4] gathered from shards of the tokens, and an index of rows."""
    graph = Graph()
    x = given(graph, "x", torch.randn(2, 3, 4, dtype=torch.bfloat16, requires_grad=True))
    rows = given(graph, "rows", torch.tensor([4, 0, 0]))
    return graph, of(graph, operator.getitem, of(graph, OPS.gather_tokens.default, x, 1, 1, group), 0), rows


def test_a_recipient_goes_through_the_row_steps_but_for_casts(group: str) -> None:
    graph, whole, rows = gathered(group)
    flat = of(graph, aten.reshape.default, of(graph, aten.to.dtype, whole, torch.float16), [-1, 4])
    frozen = of(graph, aten.detach.default, flat)
    h = of(graph, aten.cat.default, [of(graph, aten.index_select.default, flat, 0, rows), flat, frozen])
    graph.output(h)
    emit = Emit(graph)
    with emit.before(graph.output_node(), h, grad=True):
        result = recipients.to_scatter(emit, h)["recipient"]
    value = result.meta["example_value"]
    assert (value.shape, value.dtype) == (h.meta["example_value"].shape, torch.float32)
    assert [node.target for node in graph.nodes].count(OPS.hidden_sum.default) == 1
    assert [node.target for node in graph.nodes].count(aten.detach.default) == 2
    assert [node.target for node in graph.nodes].count(aten.to.dtype) == 1


def test_rows_that_are_not_of_the_gather_alone_get_none(group: str) -> None:
    graph, whole, _ = gathered(group)
    other = given(graph, "other", torch.randn(2, 3, 4, dtype=torch.bfloat16, requires_grad=True))
    h = of(graph, aten.cat.default, [whole, other])
    frozen = of(graph, aten.detach.default, whole)
    graph.output((h, frozen))
    emit = Emit(graph)
    with emit.before(graph.output_node(), h, grad=True):
        assert recipients.to_scatter(emit, h) == {}
        assert recipients.to_scatter(emit, frozen) == {}


@pytest.mark.parametrize(
    ("vocab", "ranks", "learns", "reason"),
    [
        (9, 4, False, NotInForward.NO_CLASS),
        (9, 3, False, None),
        (10, 4, False, None),
        (10, 4, True, NotInForward.SHARDS_OF_ROWS),
    ],
)
def test_which_sweeps_give_gradients_is_decided_by_what_all_ranks_know(
    vocab: int, ranks: int, learns: bool, reason: Any, group: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_sweeps.dist, "get_world_size", lambda _: ranks)
    graph = Graph()
    sizes = {"h": (3, 2), "w": (3, 2), "y": (3, 1), "cols": (0, 3), "rows": (1, 3), "u": (0,)}
    nodes = [given(graph, name, torch.zeros(size)) for name, size in sizes.items()]
    nodes[4].meta["example_value"].requires_grad_(learns)
    call = graph.call_function(OPS.shard_stats.default, (*nodes, "mulrow:0", "lse", 0, 0, vocab, group, "wide", False))
    refusal = shard_sweeps.not_in_one_sweep(call)
    assert (refusal.reason if refusal else None) == reason
