"""The value of one node: in-place ops by their pure overload, writes only where no other name sees them, constants."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from fusedhead.analysis.evaluator import LARGEST_CONSTANT, check_writes, constant, pure_overload, trace_value
from fusedhead.analysis.reasons import Untraced
from fusedhead.graph.reasons import Escape
from fusedhead.ir.expr import Expr

aten = torch.ops.aten
NODE = torch.fx.Graph().placeholder("x")


def test_an_op_in_place_is_read_as_its_pure_overload() -> None:
    assert pure_overload(aten.div_.Tensor) is aten.div.Tensor
    assert pure_overload(aten.masked_fill_.Scalar) is aten.masked_fill.Scalar
    assert pure_overload(aten.div.Tensor) is None  # writes nothing
    assert pure_overload(aten.set_.source_Tensor) is not aten.set_.source_Tensor


def copied_and_written(x: Tensor) -> Tensor:
    y = x.clone()
    y.mul_(2)
    return y.exp()


def written_beside_a_result(x: Tensor) -> Tensor:
    y = x.exp()
    x.mul_(2)
    return y


def written_under_a_view(x: Tensor) -> Tensor:
    y = x.clone()
    view = y.view(-1)
    y.mul_(2)
    return view


@pytest.mark.parametrize(
    ("program", "read"),
    [
        (lambda x: x.mul_(2), True),
        (lambda x: x.exp(), True),
        (written_beside_a_result, False),
        (written_under_a_view, False),
    ],
)
def test_a_write_is_read_where_its_result_is_the_only_name_of_the_memory(
    program: Callable[[Tensor], Tensor], read: bool
) -> None:
    traced: GraphModule = make_fx(program)(torch.ones(2, 3))
    if read:
        check_writes(traced)
    else:
        with pytest.raises(Escape) as escape:
            check_writes(traced)
        assert escape.value.refusal.reason is Untraced.WRITES_SHARED_MEMORY


def test_a_small_integer_constant_is_a_call_that_makes_it_again() -> None:
    counted = constant(torch.arange(10 * LARGEST_CONSTANT), NODE).ref
    listed = constant(torch.tensor([4, 1]), NODE).ref
    assert isinstance(counted, Expr)
    assert isinstance(listed, Expr)
    assert (counted.op, counted.args) == (aten.arange.default, (10 * LARGEST_CONSTANT,))
    assert torch.equal(listed.op(*listed.args, **listed.kwargs), torch.tensor([4, 1]))


@pytest.mark.parametrize("tensor", [torch.zeros(LARGEST_CONSTANT + 1, dtype=torch.int64), torch.tensor([0.5])])
def test_a_large_constant_or_one_of_floats_is_not_written_into_a_graph(tensor: Tensor) -> None:
    with pytest.raises(Escape) as escape:
        constant(tensor, NODE)
    assert escape.value.refusal.reason is Untraced.HOLDS_A_CONSTANT


def test_an_item_of_several_values_is_that_value() -> None:
    graph = torch.fx.Graph()
    several = graph.placeholder("several")
    second = graph.call_function(operator.getitem, (several, 1))
    assert trace_value(second, {several: ["first", "second"]}) == "second"
