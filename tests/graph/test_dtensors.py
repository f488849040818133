"""Calls of DTensor's methods in a graph: as methods, and as torch 2.11 writes them, with meshes closed over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DeviceMesh, DTensor, Replicate
from torch.fx import Graph, Node

from fusedhead.graph.dtensors import is_closure, is_conversion, placement_call, replicating
from fusedhead.graph.effects import NO_EFFECTS, draws, effects


def closure(name: str, args_as_value: Any, kwargs_as_value: Any, module: str = "torch._dynamo.variables.tensor") -> Any:
    """A function as Dynamo of torch 2.11 puts it into graphs."""

    def function(x: Any) -> Any:
        return x.call(*args_as_value, **kwargs_as_value)

    function.__name__, function.__module__ = name, module
    return function


def node_of(target: Callable[..., Any] | str, *args: Any, **kwargs: Any) -> Node:
    graph = Graph()
    x = graph.placeholder("x")
    return graph.create_node("call_method" if isinstance(target, str) else "call_function", target, (x, *args), kwargs)


def test_a_method_is_read_with_its_arguments() -> None:
    call = placement_call(node_of("to_local", grad_placements=("Partial",)))
    assert call == ("to_local", (), {"grad_placements": ("Partial",)})
    assert placement_call(node_of("full_tensor")) == ("full_tensor", (), {})
    assert placement_call(node_of("float")) is None


@pytest.mark.parametrize(("name", "method"), [("prim_redistribute", "redistribute"), ("prim_to_local", "to_local")])
def test_a_function_that_closes_over_its_arguments_is_read_with_them(name: str, method: str) -> None:
    node = node_of(closure(name, ["mesh"], {"grad_placements": ("Partial",)}))
    assert is_closure(node)
    assert placement_call(node) == (method, ("mesh",), {"grad_placements": ("Partial",)})


def test_a_function_of_somebody_else_is_not_read_by_its_name() -> None:
    node = node_of(closure("prim_to_local", [], {}, module="somebody.else"))
    assert not is_closure(node)
    assert placement_call(node) is None


def test_a_function_whose_arguments_are_not_where_they_were_is_none() -> None:
    def function(x: torch.Tensor) -> Any:
        return x.to_local()  # type: ignore[attr-defined]

    function.__name__, function.__module__ = "prim_to_local", "torch._dynamo.variables.tensor"
    node = node_of(function)
    assert is_closure(node)
    assert placement_call(node) is None


@pytest.fixture
def mesh(group: str) -> DeviceMesh:
    return DeviceMesh("cpu", [0])


class Counted(DTensor):
    """A DTensor whose ``to_local`` is user code."""

    def to_local(self, **kwargs: Any) -> Any:
        return super().to_local(**kwargs).add_(1)


def test_a_conversion_writes_to_no_memory_and_draws_no_numbers(mesh: DeviceMesh) -> None:
    value = DTensor.from_local(torch.zeros(2), mesh, [Replicate()])
    for node in node_of("to_local"), node_of(closure("prim_to_local", [], {})), node_of(replicating(mesh)):
        node.args[0].meta["example_value"] = value
        assert is_conversion(node)
        assert effects(node) == NO_EFFECTS
        assert not draws(node)


def test_a_conversion_of_a_subclass_or_by_user_code_is_not_known(mesh: DeviceMesh) -> None:
    value = DTensor.from_local(torch.zeros(2), mesh, [Replicate()])
    theirs = Counted(value._local_tensor, value._spec, requires_grad=False)
    mine = lambda x: x.to_local()  # noqa: E731
    for target, given in (("to_local", theirs), ("to_local", torch.zeros(2)), (mine, value), ("full_tensor", value)):
        node = node_of(target)
        node.args[0].meta["example_value"] = given
        assert not is_conversion(node)
