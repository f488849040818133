"""A site: its nodes, its number of tokens, and the words of a token program in the report."""

from __future__ import annotations

from typing import Any
from unittest.mock import Mock

import torch
import torch.nn.functional as F

from fusedhead.analysis.site import Region, head_nodes, ops_of, tokens_of, weight_can_be_remade
from fusedhead.graph.nodes import name_of
from fusedhead.ir.expr import Expr, Plain
from fusedhead.ir.tokenwise import HeadInput, ProgramResult, TokenValue
from tests.analysis.bodies import body_of, plain_reading
from tests.programs.claims import B, D, T, V, hidden, labels, weight

aten = torch.ops.aten


def value(*ops: Any) -> TokenValue:
    """Ops one after another on logits."""
    expr: Any = HeadInput(Mock())
    for op in ops:
        expr = Expr(op, (expr,))
    return TokenValue(expr, torch.empty(6), (False,), frozenset())


def test_the_ops_of_an_expression_are_named_once_without_their_overloads() -> None:
    assert ops_of(value(aten.exp.default, aten.exp.default, aten.sum.dim_IntList, aten.exp_.default).expr) == [
        "exp", "sum",
    ]  # fmt: skip


def test_a_region_tells_its_first_remarkable_ops() -> None:
    out = value(aten.mul.Tensor, aten.erf.default)
    more = value(aten.topk.default, aten.sin.default, aten.cos.default, aten.tan.default)
    assert Region(set(), results=[(Mock(), out)]).computes == "rowwise(erf)"
    assert Region(set(), results=[(Mock(), out), (Mock(), more)]).computes == "rowwise(erf, cos, sin, tan, ...)"


def test_a_result_leaves_a_region_once_however_often_it_is_read() -> None:
    out = value(aten.gather.default)
    read_twice = [(Mock(), out), (Mock(), Plain(Expr(aten.mean.default, (ProgramResult(out),)), None))]
    region = Region(set(), results=read_twice)
    assert region.outputs == [out]
    assert region.gathers


def test_tokens_are_counted_where_the_logits_end() -> None:
    whole = plain_reading(body_of(lambda h, w: F.linear(h, w).logsumexp(-1), hidden(), weight())).sites[0]
    most = plain_reading(body_of(lambda h, w: F.linear(h, w)[:, 1:].logsumexp(-1), hidden(), weight())).sites[0]
    assert (tokens_of(whole), tokens_of(most)) == (B * T, B * (T - 1))


def test_the_nodes_of_a_head_are_its_product_what_follows_it_and_what_its_weight_is_made_of() -> None:
    program = lambda h, w, y: F.cross_entropy(h @ w.detach().t(), y)  # noqa: E731
    site = plain_reading(body_of(program, hidden(6, D), weight(), labels(6))).sites[0]
    assert {name_of(node) for node in head_nodes(site)} >= {"matmul", "t", "detach"}
    assert weight_can_be_remade(site)


def test_a_weight_that_the_graph_computes_from_more_than_inputs_cannot_be_remade() -> None:
    program = lambda h, w, y: F.cross_entropy(F.linear(h, torch.rand_like(w) * w), y)  # noqa: E731
    site = plain_reading(body_of(program, hidden(6, D), weight(V, D), labels(6))).sites[0]
    assert not weight_can_be_remade(site)
