"""Higher-order ops: which arguments a call writes to follows from its body, and an unknown op writes to all."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.fx import Graph, GraphModule, Node

from fusedhead.graph.effects import effects
from fusedhead.graph.higher_order import bodies_of, changed_placeholders, effects_of_call, gradients_of, runs_bodies

OPS = torch.ops.higher_order


def placeholder(graph: Graph, name: str) -> Node:
    node = graph.placeholder(name)
    node.meta["example_value"] = torch.empty(3)
    return node


def body_with(*names: str, writes: str = "", results: Callable[..., Any] = lambda *nodes: nodes) -> GraphModule:
    """A body that adds one to the placeholder that ``writes`` names and returns ``results`` of its placeholders."""
    graph = Graph()
    inputs = {name: placeholder(graph, name) for name in names}
    if writes:
        write = graph.call_method("add_", (inputs[writes], 1))
        write.meta["example_value"] = inputs[writes].meta["example_value"]
    graph.output(results(*inputs.values()))
    return GraphModule(torch.nn.Module(), graph)


def call_of(op: Any, body: GraphModule, *before: Any, after: int = 2) -> Node:
    """A call of a higher-order op on a body and so many tensors."""
    graph = Graph()
    held = graph.get_attr("body")
    operands = [placeholder(graph, f"x{i}") for i in range(after)]
    call = graph.call_function(op, (*before, held, *operands))
    graph.output(call)
    GraphModule({"body": body}, graph)
    return call


def test_a_call_writes_to_the_operand_whose_placeholder_its_body_writes_to() -> None:
    call = call_of(OPS.wrap, body_with("a", "b", writes="b"))
    assert bodies_of(call) == [call.graph.owning_module.body]  # type: ignore[union-attr]
    assert effects_of_call(call, effects).written == (call.args[2],)
    assert effects_of_call(call, effects).sure


def test_a_body_that_only_reads_writes_to_nothing() -> None:
    call = call_of(OPS.wrap, body_with("a", "b"))
    assert effects_of_call(call, effects) == effects(call)
    assert effects(call).written == effects(call).backward == ()


def test_operands_that_do_not_match_the_body_are_all_taken_for_written() -> None:
    call = call_of(OPS.wrap, body_with("a", "b", writes="b"), after=3)
    assert set(effects_of_call(call, effects).written) == set(call.all_input_nodes[1:])


def test_an_op_that_is_not_in_the_table_is_taken_to_write_to_all() -> None:
    call = call_of(OPS.flex_attention_backward, body_with("a", "b"))
    assert runs_bodies(call) is None
    result = effects_of_call(call, effects)
    assert not result.sure
    assert set(result.written) == set(result.backward) == set(call.all_input_nodes[1:])


def test_a_function_that_is_not_of_higher_order_has_no_bodies() -> None:
    call = call_of(operator.add, body_with("a", "b"), after=1)
    assert bodies_of(call) == []


def test_a_write_to_memory_that_no_placeholder_has_is_not_placed() -> None:
    graph = Graph()
    a, b = placeholder(graph, "a"), placeholder(graph, "b")
    elsewhere = graph.call_function(torch.empty, (3,))
    elsewhere.meta["example_value"] = torch.empty(3)
    graph.output((a, b))
    writes = {node: effects(node)._replace(written=(node,)) for node in (a, b)}
    assert changed_placeholders(graph, writes.values()) == {0, 1}
    assert changed_placeholders(graph, [writes[b]]) == {1}
    assert changed_placeholders(graph, [writes[a]._replace(anything=True)]) is None
    assert changed_placeholders(graph, [writes[a]._replace(written=(graph.output_node(),))]) is None


@pytest.mark.parametrize(("names", "count"), [(("g", "s", "t"), 1), (("g", "s"), 0)])
def test_the_first_placeholders_of_a_backward_are_gradients_where_the_rest_is_what_was_saved(
    names: tuple[str, ...], count: int
) -> None:
    forward = body_with("x", "y", results=lambda x, y: ([x], [x, y]))  # one output, two saved
    assert gradients_of(forward, body_with(*names)) == count
    assert gradients_of(body_with("x", "y"), body_with(*names)) == 0  # no list of outputs and of what is saved
