"""Heads in shards one after another: each takes the token of the one before, and gives it back in the backward."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.fx import Graph, Node

from fusedhead.rewrite import order_collectives

N, D, V = 6, 4, 10
STATS = torch.ops.fusedhead.shard_stats.default
BACKWARD = torch.ops.fusedhead.shard_stats_backward.default


def operands() -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    return torch.randn(N, D), torch.randn(V, D), torch.randn(V, D), torch.randint(0, V, (N, 1))


def call(h: Any, w: Any, y: Any, group: str, after: Any = None) -> tuple[Any, ...]:
    empty = torch.zeros(0)
    vectors = (torch.zeros(0, V), torch.zeros(0, N), empty)
    return (h, w, y, *vectors, "", "lse,picked,lse_low", 0, 0, V, group, "wide", False, None, after)


def test_each_call_of_a_graph_takes_the_token_of_the_one_before(group: str) -> None:
    h, w, other, y = operands()
    graph = Graph()
    nodes = [graph.placeholder(name) for name in ("h", "w", "other", "y")]
    for node, value in zip(nodes, (h, w, other, y)):
        node.meta["example_value"] = value
    result = []
    for weight, value in ((nodes[1], w), (nodes[2], other), (nodes[1], w)):
        args = call(nodes[0], weight, nodes[3], group)
        constants = [graph.create_node("get_attr", f"c{len(result)}_{i}") for i in range(3)]
        result.append(graph.call_function(STATS, (*args[:3], *constants, *args[6:14])))
        result[-1].meta["example_value"] = STATS(*call(h, value, y, group))
    graph.output(tuple(result))
    order_collectives.run(SimpleNamespace(graph=graph, facts=SimpleNamespace(grad_mode=lambda node: True)))  # type: ignore[arg-type]
    assert "after" not in result[0].kwargs
    for before, node in itertools.pairwise(result):
        token = node.kwargs["after"]
        assert isinstance(token, Node)
        assert token.args == (before, len(before.meta["example_value"]) - 1)
        assert token.meta["example_value"].shape == (1,)


def test_the_backward_of_the_later_call_comes_before_that_of_the_earlier_one(group: str) -> None:
    h, w, other, y = operands()
    graphs = []

    def keep(gm: Any, inputs: Any) -> Any:
        graphs.append(gm.graph)
        return make_boxed_func(gm.forward)

    def step(h: Tensor, w: Tensor, other: Tensor, y: Tensor) -> Tensor:
        first = STATS(*call(h, w, y, group))
        second = STATS(*call(h, other, y, group, first[-1]))
        return first[0].sum() - second[1].sum()

    leaves = [x.requires_grad_() for x in (h, w, other)]
    compiled = torch.compile(step, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep))
    loss = compiled(*leaves, y)
    got = torch.autograd.grad(loss, leaves)
    exact = (h @ w.t()).logsumexp(1).sum() - (h @ other.t()).gather(1, y).sum()
    for mine, true in zip((loss, *got), (exact, *torch.autograd.grad(exact, leaves))):
        torch.testing.assert_close(mine, true)
    later, earlier = graphs[-1].find_nodes(op="call_function", target=BACKWARD)
    assert later in earlier.args[-1].all_input_nodes  # its token
