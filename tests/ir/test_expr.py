"""Expressions: one walk meets everything once and in order, and structure tells equal ones."""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

from fusedhead.ir.expr import Expr, Plain, map_nested, nodes_of, structure_key, walk

aten = torch.ops.aten


def two_inputs() -> tuple[Node, Node]:
    graph = Graph()
    return graph.placeholder("x"), graph.placeholder("y")


def test_a_walk_meets_each_object_once_and_in_order_of_appearance() -> None:
    x, y = two_inputs()
    shared = Expr(aten.exp.default, (x,))
    whole = Expr(aten.cat.default, ([shared, Plain(y, None), shared], 0))
    met = [each for each in walk(whole) if isinstance(each, (Expr, Node))]
    assert met == [whole, shared, x, y]


def test_a_walk_may_be_kept_out_of_expressions() -> None:
    x, y = two_inputs()
    inner = Expr(aten.exp.default, (x,))
    met = list(walk(Expr(aten.add.Tensor, (inner, y)), into=lambda expr: expr.op is not aten.exp.default))
    assert inner in met
    assert x not in met
    assert y in met


def test_keyword_arguments_are_walked_and_mapped() -> None:
    x, y = two_inputs()
    call = Expr(aten.add.Tensor, (x,), {"alpha": y})
    assert set(nodes_of([call])) == {x, y}
    assert call.mapped(lambda each: each is y) == ((False,), {"alpha": True})


def test_nodes_come_the_last_one_first() -> None:
    x, y = two_inputs()
    assert nodes_of([Plain(x, None), y, x]) == [y, x]


def test_lists_stay_lists_and_tuples_tuples() -> None:
    assert map_nested([1, (2, [3])], lambda each: each + 1) == [2, (3, [4])]


def test_equal_calls_of_the_same_nodes_have_one_key_and_others_do_not() -> None:
    x, y = two_inputs()

    def call(*args: object, **kwargs: object) -> Expr:
        return Expr(aten.sum.dim_IntList, args, kwargs)

    assert structure_key(call(x, [1])) == structure_key(Plain(call(Plain(x, None), [1]), None))
    keys = [structure_key(each) for each in (call(x, [1]), call(y, [1]), call(x, [0]), call(x, [1], keepdim=True))]
    assert len(set(keys)) == 4
    assert structure_key(call(x, [1])) != structure_key(Expr(aten.mean.dim, (x, [1])))
