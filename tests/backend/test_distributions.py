"""`torch.distributions.Categorical` over a vocabulary, as policy gradients write it: fused, with eager's numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Categorical

from fusedhead.broadcasts import separate
from tests.refusals.claims import D, hidden, labels, right, weight


@pytest.mark.parametrize("shape", [(6,), (2, 5)])
def test_the_log_probability_of_an_action_is_gathered(shape: tuple[int, ...]) -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return -Categorical(logits=F.linear(h, w)).log_prob(y).mean()

    report = right(program, hidden(*shape, D), weight(), labels(*shape))
    assert "gather" in str(report)


def test_an_entropy_bonus_beside_it_shares_the_sweep() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor, advantage: Tensor) -> Tensor:
        policy = Categorical(logits=F.linear(h, w))
        return -(policy.log_prob(y) * advantage).mean() - 0.01 * policy.entropy().mean()

    right(program, hidden(6, D), weight(), labels(6), torch.randn(6))


def graph_of(program: Any, *inputs: Tensor) -> torch.fx.Graph:
    found: list[torch.fx.GraphModule] = []

    def keep(gm: torch.fx.GraphModule, _: Any) -> Any:
        found.append(gm)
        return gm

    torch.compile(program, backend=keep)(*inputs)
    return found[0].graph


def test_results_of_a_broadcast_are_their_operands_or_expand_them() -> None:
    def program(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        return torch.broadcast_tensors(a, b, c)

    inputs = torch.randn(4, 1), torch.randn(3, 4, 5), torch.randn(5)
    graph = graph_of(program, *inputs)
    separate(graph)
    expands = [node.args[1] for node in graph.nodes if node.target == "expand"]
    assert expands == [[3, -1, 5], [3, 4, -1]]
    results = torch.fx.GraphModule(torch.nn.Module(), graph)(*inputs)
    for got, expected in zip(results, program(*inputs)):
        assert torch.equal(got, expected)
        assert got.stride() == expected.stride()
