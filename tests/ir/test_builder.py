"""The builder: a new node has a fake value, the grad mode and line of its place, and a call is emitted once a place."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, Node

from fusedhead.graph.nodes import fake
from fusedhead.ir.builder import Emit, named
from fusedhead.ir.expr import Expr, Plain

aten = torch.ops.aten


def program() -> tuple[Graph, Node, Node]:
    """x [2, 3, 5] that wants a gradient, and a node after it."""
    graph, mode = Graph(), FakeTensorMode()
    x = graph.placeholder("x")
    with mode:
        x.meta["example_value"] = torch.empty(2, 3, 5, requires_grad=True)
    after = graph.call_function(aten.exp.default, (x,))
    after.meta |= {"example_value": x.meta["example_value"].exp(), "stack_trace": "line 7"}
    graph.output(after)
    return graph, x, after


def test_a_call_lands_before_its_anchor_with_a_fake_value_and_the_line() -> None:
    graph, x, after = program()
    emit = Emit(graph)
    with emit.before(after, after, grad=True):
        result = named(emit(aten.neg.default, x), "negative")
    assert [node.name for node in graph.nodes] == ["x", "negative", after.name, "output"]
    assert fake(result).shape == (2, 3, 5)
    assert fake(result).requires_grad
    assert result.meta["stack_trace"] == "line 7"
    assert emit.nodes == [result]


def test_without_grad_the_value_has_no_gradient() -> None:
    graph, x, after = program()
    emit = Emit(graph)
    with emit.before(after, after, grad=False):
        assert not fake(emit(aten.neg.default, x)).requires_grad


def test_an_expression_is_emitted_once_a_place() -> None:
    graph, x, after = program()
    emit, shared = Emit(graph), Expr(aten.exp.default, (x,))
    with emit.before(after, after, grad=True):
        first = emit.ref(Expr(aten.add.Tensor, (shared, Plain(shared, None))))
        assert first.args[0] is first.args[1]
        assert emit.ref(shared) is first.args[0]
    with emit.before(after, after, grad=True):
        assert emit.ref(shared) is not first.args[0]


def test_an_operand_that_was_replaced_is_its_replacement() -> None:
    graph, x, after = program()
    emit = Emit(graph)
    with emit.before(after, after, grad=True):
        by = emit(aten.neg.default, x)
        emit.replaced(after, by)
        assert emit.ref(Plain(after, None)) is by


def test_shapes_and_casts_emit_nothing_where_nothing_changes() -> None:
    graph, x, after = program()
    emit = Emit(graph)
    with emit.before(after, after, grad=True):
        assert emit.sizes(x) == [2, 3, 5]
        assert emit.last(x, 2) is x
        assert emit.last(x, -1) is x
        assert emit.cast(x, torch.float32) is x
        assert emit.nodes == []
        assert fake(emit.last(x, 0)).shape == (3, 5, 2)
        assert fake(emit.flat(x)).shape == (30,)
        assert fake(emit.cast(x, torch.float64)).dtype == torch.float64


def test_a_size_that_is_a_symbol_needs_a_node() -> None:
    graph, x, after = program()
    emit = Emit(graph)
    with emit.before(after, after, grad=True), pytest.raises(AssertionError, match="a size without a node"):
        emit(aten.view.default, x, [torch.SymInt(6)])  # type: ignore[arg-type]
