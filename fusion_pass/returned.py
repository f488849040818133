"""Logits that the graph returns: the graph returns h instead, and the logits are computed from it outside.

A differentiable output of a compiled graph gets a gradient whether or not anyone uses it: AOTAutograd fills an
[N, V] tensor of zeros and multiplies it through the head twice. Computed outside the differentiated graph, in
eager mode, logits that nobody uses cost no backward, and used ones are exactly what the program would have got.

A `Recipe` is the part of the original graph between the hidden states and the returned node, with its inputs.
This file does not decide which outputs are replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from fusedhead.interpret import Site
from fusedhead.read import fake, name_of
from fusedhead.rewrite import PURE_VIEWS


@dataclass(frozen=True, eq=False)
class Recipe:
    """How one returned tensor is computed from tensors that are cheap to return."""

    slot: int  # its place among the graph's outputs
    program: GraphModule  # the nodes from the projection to the output
    sources: tuple[Node, ...]  # the program's inputs: graph inputs, or nodes that the graph returns in addition
    device: str


def program_of(site: Site, output: Node) -> tuple[list[Node], list[Node]]:
    """The nodes that make ``output`` out of the head's operands, in order, and the inputs they need."""
    inside: set[Node] = set()
    sources: list[Node] = []
    stack = [output]
    followed = {site.head.node, *site.followed}
    while stack:
        node = stack.pop()
        if node in inside or node in sources:
            continue
        cheap = name_of(node) in PURE_VIEWS if node.op.startswith("call_") else False
        if node in followed or (cheap and rooted_in_inputs(node)):
            inside.add(node)
            stack.extend(node.all_input_nodes)
        else:
            sources.append(node)
    order = {node: i for i, node in enumerate(output.graph.nodes)}
    return sorted(inside, key=order.__getitem__), sorted(sources, key=order.__getitem__)


def rooted_in_inputs(node: Node) -> bool:
    """Whether a chain of views starts at graph inputs only (a transposed or cast weight)."""
    if node.op == "placeholder":
        return True
    return (
        node.op.startswith("call_")
        and name_of(node) in PURE_VIEWS
        and all(rooted_in_inputs(source) for source in node.all_input_nodes)
    )


def recipe(site: Site, slot: int, output: Node) -> Recipe:
    """The recipe of a followed node that the graph returns in ``slot``.

    Autocast is off when it runs; where it acted in the graph, the recorded dtypes bring explicit casts.
    """
    nodes, sources = program_of(site, output)
    graph = Graph()
    env: dict[Node, Node] = {source: graph.placeholder(source.name) for source in sources}
    for node in nodes:
        if node is site.head.node:
            dtype = site.head.dtype
            for source in node.all_input_nodes:
                if fake(source).is_floating_point() and fake(source).dtype != dtype:
                    env[source] = graph.call_method("to", (env[source], dtype))
        args, kwargs = map_arg((node.args, node.kwargs), env.__getitem__)
        env[node] = graph.create_node(node.op, node.target, args, kwargs)
    result, wanted = env[output], fake(output).dtype
    graph.output(graph.call_method("to", (result, wanted)))
    program = GraphModule(torch.nn.Module(), graph)
    return Recipe(slot, program, tuple(sources), fake(output).device.type)


Finish = Callable[[Recipe, Sequence[Any]], Any]


def compute_now(recipe: Recipe, sources: Sequence[Any]) -> Tensor:
    """The returned tensor itself, computed in eager mode."""
    with torch.autocast(recipe.device, enabled=False):
        return recipe.program(*sources)


def redirect(graph: Graph, recipes: Sequence[Recipe]) -> Callable[..., Callable[..., Any]]:
    """Make the graph return the recipes' sources instead of their tensors.

    Returns a function that wraps the compiled graph into a callable with the original outputs.
    """
    output = next(node for node in graph.nodes if node.op == "output")
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    returned: list[Any] = list(output.args[0])
    by_slot = {r.slot: r for r in recipes}
    kept = [value for slot, value in enumerate(returned) if slot not in by_slot]
    extra = list(dict.fromkeys(s for r in recipes for s in r.sources if s.op != "placeholder"))
    output.args = ((*kept, *extra),)
    count = len(returned)
    # where each recipe finds its sources at run time: (True, index of an input) or (False, index of an output)
    plan = {
        r.slot: [
            (True, placeholders.index(s)) if s.op == "placeholder" else (False, len(kept) + extra.index(s))
            for s in r.sources
        ]
        for r in recipes
    }

    def wrap(compiled: Callable[..., Any], finish: Finish = compute_now) -> Callable[..., Any]:
        def with_returned_logits(*inputs: Any) -> list[Any]:
            outputs = compiled(*inputs)
            results, plain = [], iter(outputs[: len(kept)])
            for slot in range(count):
                if slot in plan:
                    given = [inputs[i] if from_input else outputs[i] for from_input, i in plan[slot]]
                    results.append(finish(by_slot[slot], given))
                else:
                    results.append(next(plain))
            return results

        return with_returned_logits

    return wrap
