"""Every op of torch that writes is held to it, in every spelling; a call that writes to nothing is not.

A sample of what ``python -m tests.mutations`` runs in full.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._ops import _higher_order_ops
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.testing._internal.common_methods_invocations import op_db

from fusedhead.graph.effects import effects, nodes_written
from fusedhead.graph.higher_order import OPERANDS
from tests.mutations.calls import marked, ops_that_write, record
from tests.mutations.every_op import ELSEWHERE, check_all
from tests.mutations.reading import read

MODE = FakeTensorMode()


def counterparts(ops: list[str]) -> Iterator[Any]:
    """The entries of torch's database that are named as ops are that write: their arguments will do."""
    bare = {name.split("::")[1].split(".")[0].strip("_").removesuffix("_out") for name in ops}
    for info in op_db:
        names = (info.name.rpartition(".")[2], info.aten_name or "", *(alias.name for alias in info.aliases))
        if not bare.isdisjoint(name.strip("_") for name in names):
            yield info


def given(graph: Graph, name: str) -> Node:
    node = graph.placeholder(name)
    with MODE:
        node.meta["example_value"] = torch.empty(2, 2)
    return node


def test_every_argument_that_a_schema_marks_is_written() -> None:
    ops = ops_that_write()
    assert len(ops) > 1000
    for name, op in ops.items():
        graph = Graph()
        kinds = {a.name: str(a.type) for a in op._schema.arguments}
        nodes: dict[str, Any] = {name: given(graph, name) for name, kind in kinds.items() if "Tensor" in kind}
        listed = {name: [node] if "List" in kinds[name] else node for name, node in nodes.items()}
        call = graph.call_function(op, (), listed)
        expected = {nodes[a] for a in marked(op) if a in nodes}
        assert expected <= set(nodes_written(call)), name


def test_ops_that_write_between_projection_and_loss_are_seen_to() -> None:
    ops = [(name, op) for name, op in ops_that_write().items() if name.split("::")[0] not in ELSEWHERE]
    drawn = random.Random(1).sample(ops, 130)
    samples = record(counterparts([name for name, _ in drawn]), each=1)
    tally = check_all(drawn, samples, every=False, seed=2)
    assert not tally.differences, str(tally)
    assert len(tally.ops) > 40, str(tally)
    assert tally.telling > tally.programs / 4, str(tally)
    assert tally.exact > 0.9 * tally.programs, str(tally)


def test_calls_that_write_to_nothing_are_held_to_write_to_nothing() -> None:
    counts, feared = read(random.Random(3).sample(op_db, 50), each=1)
    assert counts["reads"] > 40, counts
    assert not [name for name in feared if not name.endswith("could not be run")]
    assert counts["not found out"] < 0.1 * counts["reads"], feared


def body(writes: bool) -> GraphModule:
    graph = Graph()
    x = given(graph, "x")
    y = graph.call_method("mul_" if writes else "mul", (x, 2))
    y.meta["example_value"] = x.meta["example_value"] if writes else MODE.from_tensor(torch.empty(2, 2))
    graph.output((y,))
    return GraphModule(torch.nn.Module(), graph)


def calls_of(name: str, writes: bool) -> list[tuple[Node, Node]]:
    """Calls of a higher-order op with its arguments laid out in several ways, and the operand of each."""
    results = []
    for layout in range(5):
        root = torch.nn.Module()
        root.add_module("body", body(writes))
        graph = Graph()
        x, run = given(graph, "x"), graph.get_attr("body")
        args: Any = [(run, x), (run, (x,)), (run, "name", x), (x, run, run, (x,)), (run, [x], [x], [x])][layout]
        call = graph.call_function(getattr(torch.ops.higher_order, name), args)
        graph.output(call)
        graph.owning_module = GraphModule(root, graph)
        results.append((call, x))
    return results


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node")
@pytest.mark.parametrize("name", sorted(_higher_order_ops))
def test_a_higher_order_op_writes_what_its_body_writes(name: str) -> None:
    for call, operand in calls_of(name, writes=True):
        does = effects(call)
        assert operand in (*does.written, *does.backward)
    if name in OPERANDS:
        assert not any(effects(call).written for call, _ in calls_of(name, writes=False))
    else:
        assert all(operand in nodes_written(call) for call, operand in calls_of(name, writes=False))


def test_a_module_and_a_function_that_cannot_be_run_write_to_anything() -> None:
    def opaque(x: Tensor) -> None:
        raise RuntimeError

    graph = Graph()
    x, y = given(graph, "x"), given(graph, "y")
    call = graph.call_function(opaque, (x,))
    assert set(nodes_written(call)) == {x, y}
    assert set(nodes_written(graph.create_node("call_module", "inner", ()))) >= {x, y}
