"""The loss tail: it ends at a scalar to which everything that the statistics reach leads, the latest first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, Node

from fusedhead.rewrite.loss_tail import differentiable, tails

aten = torch.ops.aten


class Program:
    """A graph on one statistic [6] that wants a gradient."""

    def __init__(self) -> None:
        self.graph, self.mode = Graph(), FakeTensorMode()
        self.lse = self.graph.placeholder("lse")
        with self.mode:
            self.lse.meta["example_value"] = torch.empty(6, requires_grad=True)

    def __call__(self, op: Callable[..., Any], *args: Any) -> Node:
        node = self.graph.call_function(op, args)
        with self.mode:
            node.meta["example_value"] = op(*(a.meta["example_value"] if isinstance(a, Node) else a for a in args))
        return node

    def tails(self, *results: Node) -> list[Sequence[Node]]:
        self.graph.output(results)
        return list(tails([self.lse]))


def test_the_latest_scalar_comes_first() -> None:
    p = Program()
    mean = p(aten.mean.default, p.lse)
    loss = p(aten.mul.Tensor, mean, 2.0)
    assert p.tails(loss) == [[mean, loss], [mean]]


def test_a_result_that_is_returned_beside_the_scalar_ends_the_tail_before_it() -> None:
    p = Program()
    mean = p(aten.mean.default, p.lse)
    loss = p(aten.mul.Tensor, mean, 2.0)
    assert p.tails(loss, mean) == [[mean]]


def test_a_value_of_tokens_that_leaves_has_no_tail() -> None:
    p = Program()
    losses = p(aten.exp.default, p.lse)
    mean = p(aten.mean.default, losses)
    assert p.tails(mean, losses) == []


def test_branches_that_meet_are_one_tail() -> None:
    p = Program()
    left, right = p(aten.sum.default, p.lse), p(aten.mean.default, p.lse)
    both = p(aten.add.Tensor, left, right)
    assert p.tails(both) == [[left, right, both]]


def test_what_has_no_gradient_is_no_part_of_it() -> None:
    p = Program()
    count = p(aten.sum.default, p(aten.detach.default, p.lse))
    mean = p(aten.mean.default, p.lse)
    loss = p(aten.div.Tensor, mean, count)
    assert not differentiable(count)
    assert p.tails(loss, count)[0] == [mean, loss]


def test_the_pieces_of_a_tensor_carry_gradients() -> None:
    p = Program()
    assert differentiable(p(lambda x: x.chunk(2), p.lse))
    assert isinstance(p.lse.meta["example_value"], Tensor)
