"""Recipes: which nodes make an output again, what the graph returns instead, and when the result has a gradient."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node

from fusedhead.graph.nodes import fake, name_of
from fusedhead.graph.recipes import (
    Recipe,
    compute_now,
    computed_at_once,
    has_gradient,
    name_for_users,
    nested,
    program_of,
    recipe_of,
    redirect,
    rooted_in_inputs,
    unwrapped,
)
from tests.graph.dynamo import dynamo_graph, node_called

H, W = torch.randn(6, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)


def program(h: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    x = h.tanh()
    return (x @ w.t()) * 2, x.sum()


def recipe_in(gm: GraphModule) -> tuple[Recipe, list[Node]]:
    """The recipe of the logits, which are the graph's first output, and its nodes."""
    product, output = node_called(gm, "matmul"), node_called(gm, "mul")
    nodes, sources = program_of([output], {product, output})
    return recipe_of(nodes, sources, {product: (9, 4)}, 0, output, 1), nodes


def test_a_program_reaches_down_to_what_is_not_followed_and_takes_views_of_inputs_along() -> None:
    recipe, nodes = recipe_in(dynamo_graph(program, H, W))
    assert [name_of(node) for node in nodes] == ["t", "matmul", "mul"]
    assert [node.op for node in recipe.sources] == ["placeholder", "call_method"]
    assert (recipe.slot, recipe.class_dim, recipe.exact, recipe.graded) == (0, 1, {9, 4}, (0, 1))


def test_a_write_to_the_memory_of_a_node_belongs_to_its_program() -> None:
    def written(h: Tensor, w: Tensor) -> Tensor:
        z = F.linear(h, w)
        z.mul_(2)
        return z

    gm = dynamo_graph(written, H, W)
    z, write = node_called(gm, "linear"), node_called(gm, "mul_")
    assert program_of([z], {z, write})[0] == [z, write]


def test_a_redirected_graph_returns_the_sources_and_its_wrap_the_program_s_outputs() -> None:
    gm = dynamo_graph(program, H, W)
    recipe, _ = recipe_in(gm)
    wrap = redirect(gm.graph, [recipe])
    gm.recompile()
    total, x = gm(H, W)
    assert x.shape == (6, 4)
    logits, again = wrap(gm, compute_now)(H, W)
    torch.testing.assert_close((logits, again), program(H, W))
    assert torch.equal(again, total)


def test_the_result_has_a_gradient_where_all_that_the_graph_computed_has_one() -> None:
    recipe, _ = recipe_in(dynamo_graph(program, H, W))
    fixed = W.detach()
    assert has_gradient(recipe, (W, H))
    assert has_gradient(recipe, (fixed, H))  # a frozen head
    assert not has_gradient(recipe, (W, H.detach()))  # computed without gradients this time
    assert not compute_now(recipe, (W, H.detach())).requires_grad


def test_only_views_and_casts_of_inputs_are_rooted_in_them() -> None:
    gm = dynamo_graph(lambda h, w: (h * 2) @ w.t().to(torch.float32), H, W)
    transposed = node_called(gm, "t")
    assert rooted_in_inputs(transposed)
    assert not rooted_in_inputs(node_called(gm, "mul"))
    assert not rooted_in_inputs(node_called(gm, "matmul"))
    assert fake(transposed).shape == (4, 9)


def test_sources_are_told_by_the_names_that_users_gave_them() -> None:
    head = torch.nn.Linear(4, 9)
    gm = dynamo_graph(lambda h: head(h.tanh()), H)
    names = {name_for_users(source) for source in node_called(gm, "linear").all_input_nodes}
    assert "the hidden states" in names
    assert any("weight" in name for name in names)


def test_wraps_nest_with_the_inner_one_at_the_graph() -> None:
    def adding(text: str) -> Any:
        return lambda compiled, finish: lambda: f"{text}({compiled()})"

    outer, inner = adding("outer"), adding("inner")
    both = nested(outer, inner)
    assert both is not None
    assert both(lambda: "graph", compute_now)() == "outer(inner(graph))"
    assert nested(None, inner) is inner
    assert nested(outer, None) is outer
    assert nested(None, None) is None
    assert computed_at_once(unwrapped)(len, compute_now) is len
