"""Calls that read only the shape of a tensor do not tie it to the logits: ``broadcast_tensors``, ``expand_as``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fusedhead.analysis.body import Body
from fusedhead.canonicalize import expand_broadcasts
from fusedhead.options import Options
from tests.programs.claims import D, hidden, labels, right, weight


def graph_of(program: Any, *inputs: Tensor) -> torch.fx.Graph:
    results: list[torch.fx.GraphModule] = []

    def keep(gm: torch.fx.GraphModule, _: Any) -> Any:
        results.append(gm)
        return gm

    torch.compile(program, backend=keep)(*inputs)
    return results[0].graph


def test_results_of_a_broadcast_are_their_operands_or_expand_them() -> None:
    def program(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        return torch.broadcast_tensors(a, b, c)

    inputs = torch.randn(4, 1), torch.randn(3, 4, 5), torch.randn(5)
    graph = graph_of(program, *inputs)
    expand_broadcasts.run(Body(graph, Options()))
    expands = [node.args[1] for node in graph.nodes if node.target == "expand"]
    assert expands == [[3, -1, 5], [-1, -1, -1], [3, 4, -1]]
    results = torch.fx.GraphModule(torch.nn.Module(), graph)(*inputs)
    for got, expected in zip(results, program(*inputs)):
        assert torch.equal(got, expected)
        assert got.stride() == expected.stride()


def test_expand_as_is_expand() -> None:
    def program(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return a.expand_as(b) + 1, b.expand_as(b)

    inputs = torch.randn(4, 1), torch.randn(3, 4, 5)
    graph = graph_of(program, *inputs)
    expand_broadcasts.run(Body(graph, Options()))
    assert [node.args[1] for node in graph.nodes if node.target == "expand"] == [[3, -1, 5], [-1, -1, -1]]
    got = torch.fx.GraphModule(torch.nn.Module(), graph)(*inputs)
    assert got[1] is not inputs[1]  # what is returned stays a tensor of its own
    for one, expected in zip(got, program(*inputs)):
        assert torch.equal(one, expected)


@pytest.mark.parametrize("dynamic", [False, True])
def test_an_accuracy_compares_labels_with_the_best_classes(dynamic: bool) -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        z = F.linear(h, w)
        _, best = z.topk(3, 1, True, True)
        result = best.t().eq(y.view(1, -1).expand_as(best.t()))
        return F.cross_entropy(z, y), result[:1].reshape(-1).float().sum(0) + result[:3].float().sum()

    right(program, hidden(6, D), weight(), labels(6), fused=0 if dynamic else 1, dynamic=dynamic)
