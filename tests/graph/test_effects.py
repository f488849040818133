"""What a node writes to is found out from schemas and runs, for every spelling; reading is shown, never assumed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fusedhead.graph.aliases import storages
from fusedhead.graph.effects import draws, effects, memory_written, writes
from fusedhead.graph.nodes import name_of
from tests.graph.dynamo import dynamo_graph, node_called

READS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "function": lambda x, y: torch.exp(x),
    "method": lambda x, y: x.mul(y),
    "operator": lambda x, y: x + y,
    "view": lambda x, y: x.view(-1),
    "dropout that does not train": lambda x, y: F.dropout(x, 0.5, False),
    "batch norm that does not train": lambda x, y: F.batch_norm(x, y[0], y[1].abs(), training=False),
}
WRITES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "method": lambda x, y: y.add_(1),
    "augmented": lambda x, y: y.__iadd__(1),
    "item": lambda x, y: y.__setitem__(0, 1.0),
    "out=": lambda x, y: torch.add(x, 1, out=y),
    "through a view": lambda x, y: y[0].zero_(),
    "in place by an argument": lambda x, y: F.relu(y, inplace=True),
    "of a list": lambda x, y: torch._foreach_add_([y], 1),
    "running statistics": lambda x, y: F.batch_norm(x, y[0], y[1], training=True),
}


def calls(program: Callable[[Tensor, Tensor], Any]) -> tuple[Any, list[Any]]:
    def traced(x: Tensor, y: Tensor) -> Tensor:
        program(x, y)
        return x.sum() + y.sum()

    gm = dynamo_graph(traced, torch.ones(4, 4), torch.ones(4, 4))
    return gm, [node for node in gm.graph.nodes if node.op.startswith("call_")]


@pytest.mark.parametrize("program", READS.values(), ids=READS)
def test_what_only_reads_is_shown_to_write_nothing(program: Callable[[Tensor, Tensor], Any]) -> None:
    _, nodes = calls(program)
    assert not any(map(writes, nodes))
    assert all(effects(node).sure for node in nodes)


@pytest.mark.parametrize("program", WRITES.values(), ids=WRITES)
def test_a_write_is_one_to_the_memory_of_the_tensor(program: Callable[[Tensor, Tensor], Any]) -> None:
    gm, nodes = calls(program)
    (y,) = (node for node in gm.graph.find_nodes(op="placeholder") if "y" in node.name)  # in order of use
    assert set().union(*map(memory_written, nodes)) == storages(y)


def test_random_numbers_are_noticed_and_a_dropout_that_does_not_train_draws_none() -> None:
    def program(x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, True) + F.dropout(x, 0.5, False) + torch.rand_like(x)

    gm = dynamo_graph(program, torch.ones(4))
    trains, rests = node_called(gm, "dropout"), node_called(gm, "dropout", 1)
    assert (draws(trains), draws(rests), draws(node_called(gm, "rand_like"))) == (True, False, True)


def test_an_answer_is_kept_until_the_node_has_other_arguments() -> None:
    gm = dynamo_graph(lambda x, y: x.add(y).sum(), torch.ones(3), torch.ones(3))
    node = node_called(gm, "add")
    assert effects(node) is effects(node)
    assert not writes(node)
    node.target = "add_"
    assert name_of(node) == "add_"
    assert writes(node)
