"""The gradient of a tail: coefficients where the tail is linear in the statistics, and the reason where it is not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from fusedhead.analysis.reasons import NotInForward
from fusedhead.compat import FakeTensorMode
from fusedhead.graph.reasons import Refusal
from fusedhead.rewrite.tail_gradient import coefficients, dependent, needed, shape_only

aten = torch.ops.aten
N = 6
WEIGHTS = torch.linspace(0.5, 2, N)


class Tail:
    """Calls on a statistic [N] that wants a gradient and on weights [N] from outside."""

    def __init__(self) -> None:
        self.graph, self.mode = Graph(), FakeTensorMode()
        self.lse, self.weights = self.given("lse", True), self.given("weights", False)
        self.nodes: list[Node] = []

    def given(self, name: str, grad: bool) -> Node:
        node = self.graph.placeholder(name)
        with self.mode:
            node.meta["example_value"] = torch.empty(N, requires_grad=grad)
        return node

    def __call__(self, op: Callable[..., Any], *args: Any) -> Node:
        node = self.graph.call_function(op, args)
        with self.mode:
            node.meta["example_value"] = op(*(a.meta["example_value"] if isinstance(a, Node) else a for a in args))
        self.nodes.append(node)
        return node

    def coefficients(self, squares: Sequence[Node] = (), same: Node | None = None) -> GraphModule | Refusal:
        """Of the whole tail; ``same``: a node whose gradient is that of the last one."""
        inside = [node for node in self.nodes if node not in squares]
        transparent = {} if same is None else {self.nodes[-1]: same}
        return coefficients([self.lse], squares, inside, [self.weights], transparent)


def numbers(program: GraphModule | Refusal, *statistics: Tensor) -> list[Tensor]:
    assert isinstance(program, GraphModule), program
    return program(*statistics, WEIGHTS)


def test_the_coefficients_of_a_weighted_mean_are_its_weights_over_their_sum() -> None:
    tail = Tail()
    total = tail(aten.sum.default, tail(aten.mul.Tensor, tail.lse, tail.weights))
    tail(aten.div.Tensor, total, tail(aten.sum.default, tail.weights))
    (of_lse,) = numbers(tail.coefficients(), torch.full((N,), float("nan")))  # the statistics are not read
    torch.testing.assert_close(of_lse, WEIGHTS / WEIGHTS.sum())


def test_a_square_is_linear_as_a_statistic_of_its_own() -> None:
    tail = Tail()
    square = tail(aten.square.default, tail.lse)
    tail(aten.sum.default, tail(aten.add.Tensor, tail.lse, tail(aten.mul.Tensor, square, 0.25)))
    assert isinstance(tail.coefficients(), Refusal)
    of_lse, of_square = numbers(tail.coefficients([square]), torch.zeros(N), torch.zeros(N))
    torch.testing.assert_close((of_lse, of_square), (torch.ones(N), torch.full((N,), 0.25)))


@pytest.mark.parametrize(
    ("steps", "reason"),
    [
        ((aten.exp.default, aten.sum.default), NotInForward.NOT_LINEAR),
        ((aten.rand_like.default, aten.sum.default), NotInForward.NOT_DIFFERENTIABLE),
        ((lambda x: aten.dropout.default(x, 0.5, True), aten.sum.default), NotInForward.RANDOM),
        ((lambda x: torch.tensor(x.sum().item()) * x.sum(),), NotInForward.NOT_DIFFERENTIABLE),
    ],
)
def test_a_tail_that_is_not_linear_is_refused_with_its_reason(
    steps: Sequence[Callable[..., Any]], reason: NotInForward
) -> None:
    tail, node = Tail(), None
    for step in steps:
        if "item" in getattr(getattr(step, "__code__", None), "co_names", ()):
            node = tail.graph.call_function(step, (tail.lse,))
            tail.nodes.append(node)
        else:
            node = tail(step, node or tail.lse)
    refusal = tail.coefficients()
    assert isinstance(refusal, Refusal)
    assert refusal.reason is reason


def test_a_node_that_adds_a_number_has_the_gradient_of_what_it_is_added_to() -> None:
    tail = Tail()
    total = tail(aten.sum.default, tail.lse)
    tail(aten.add.Tensor, total, 3.0)
    (of_lse,) = numbers(tail.coefficients(same=total), torch.zeros(N))
    assert torch.equal(of_lse, torch.ones(N))


def test_the_shape_of_a_statistic_is_no_dependency_on_it() -> None:
    graph = Graph()
    statistic, other = graph.placeholder("statistic"), graph.placeholder("other")
    zeros = graph.call_function(aten.zeros_like.default, (statistic,))
    both = graph.call_function(aten.add.Tensor, (zeros, other))
    read = graph.call_function(aten.mul.Tensor, (statistic, other))
    graph.output((both,))
    assert shape_only(zeros)
    assert dependent(graph, 1) == {statistic, read}
    assert needed(graph, dependent(graph, 1)) == [zeros, both]
