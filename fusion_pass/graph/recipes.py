"""Recipes: parts of a graph that run outside of the compiled graph and make some of its outputs.

A `Recipe` is the part of the graph between the hidden states and a returned node, with its inputs. The compiled graph
returns those inputs instead (`redirect`), and a wrapper around it makes the output, at once or on demand.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from fusedhead.graph.aliases import storages
from fusedhead.graph.effects import memory_written
from fusedhead.graph.facts import GraphFacts
from fusedhead.graph.nodes import SOURCE_INTERNALS, fake, name_of
from fusedhead.graph.op_names import REMADE_FREELY
from fusedhead.graph.run_counts import Run
from fusedhead.graph.weight_recipes import is_cast

LEAST_TOKENS = 64  # fewer are not deferred when no gradient is recorded, as in generation


@dataclass(frozen=True, eq=False)
class Recipe:
    """The computation of one returned tensor from tensors that are cheap to return."""

    slot: int  # its index among the graph's outputs
    program: GraphModule  # the nodes from the projection to the output
    sources: tuple[Node, ...]  # the program's inputs: graph inputs, or nodes that the graph returns in addition
    device: str
    class_dim: int  # the vocabulary's dimension
    exact: frozenset[int]  # sizes of the head, not of a batch
    names: tuple[str, ...]  # users' names of the sources that are tensors
    # the sources that a gradient reaches through it: none where the program computes it under no_grad, in whatever grad
    # mode the compiled graph is called
    graded: tuple[int, ...]
    least: int = 0  # fewer logits are computed at once, for a number of tokens that is a symbol
    runs: tuple[Run, ...] = ()  # counters of the heads whose logits it computes
    # of several heads: the tensor sources that each head's weight is made of
    weights: tuple[frozenset[int], ...] = ()


Finish = Callable[[Recipe, Sequence[Any]], Any]  # makes a returned tensor of the recipe's sources
Wrap = Callable[[Callable[..., Any], Finish], Callable[..., Any]]  # restores the outputs of a compiled graph


def program_of(outputs: Sequence[Node], followed: Collection[Node]) -> tuple[list[Node], list[Node]]:
    """The nodes among ``followed`` that compute ``outputs`` from the operands of heads, in order, and their inputs.

    They include the nodes that write to the memory of others, so that a run in order leaves the program's values.
    """
    inside: set[Node] = set()
    sources: list[Node] = []
    stack = list(outputs)
    writers = {node: memory_written(node) for node in followed}
    while stack:
        node = stack.pop()
        if node in inside or node in sources:
            continue
        if node in followed or is_view_of_inputs(node):
            inside.add(node)
            stack.extend(node.all_input_nodes)
            shared = storages(node)
            stack.extend(writer for writer, targets in writers.items() if not shared.isdisjoint(targets))
        else:
            sources.append(node)
    order = {node: i for i, node in enumerate(outputs[0].graph.nodes)}
    return sorted(inside, key=order.__getitem__), sorted(sources, key=order.__getitem__)


def is_view_of_inputs(node: Node) -> bool:
    """Whether a node is a view of graph inputs, which is recomputed at no cost."""
    return node.op.startswith("call_") and name_of(node) in REMADE_FREELY and rooted_in_inputs(node)


def rooted_in_inputs(node: Node) -> bool:
    """Whether a node is made of graph inputs by views and casts only (a transposed or cast weight)."""
    if node.op == "placeholder":
        return True
    return (
        node.op.startswith("call_")
        and name_of(node) in REMADE_FREELY
        and all(rooted_in_inputs(source) for source in node.all_input_nodes)
    )


def name_for_users(source: Node) -> str:
    """ "lm_head.weight" for a parameter, the Python name for another input, "the hidden states" for any other node."""
    if source.op != "placeholder":
        return "the hidden states"
    origin = getattr(source, "_dynamo_source", None)
    spelled = getattr(origin, "name", "")
    path = re.findall(r"\['?(\w+)'?\]", spelled() if callable(spelled) else spelled)
    path = [part for part in path if part not in SOURCE_INTERNALS]
    return ".".join(path) or str(source.target)


def recipe_of(
    nodes: Sequence[Node],
    sources: Sequence[Node],
    heads: Mapping[Node, Sequence[Any]],
    slot: int,
    output: Node,
    class_dim: int,
) -> Recipe:
    """The recipe of ``output``, which ``nodes`` make of ``sources``; ``heads``: the projections and their [V, D].

    A recipe runs without autocast: where autocast acted in the graph, the recorded dtypes become explicit casts. A
    value made under ``no_grad`` in a graph that records gradients is detached.
    """
    grad_mode = GraphFacts(output.graph).grad_mode
    graph = Graph()
    env: dict[Node, Node] = {source: graph.placeholder(source.name) for source in sources}
    for node in nodes:
        operands = dict(env)
        for source in node.all_input_nodes:
            if is_cast(node, source):
                operands[source] = graph.call_method("to", (env[source], fake(node).dtype))
        args, kwargs = map_arg((node.args, node.kwargs), operands.__getitem__)
        env[node] = graph.create_node(node.op, node.target, args, kwargs)
        if grad_mode(output) and not grad_mode(node) and isinstance(fake(node), Tensor):
            env[node] = graph.call_method("detach", (env[node],))
    graph.output(graph.call_method("to", (env[output], fake(output).dtype)))
    program = GraphModule(torch.nn.Module(), graph)
    names = tuple(name_for_users(s) for s in sources if isinstance(fake(s), Tensor))
    exact = frozenset(size for shape in heads.values() for size in shape if isinstance(size, int))
    graded = tuple(at for at, source in enumerate(sources) if fake(output).requires_grad and wants_gradient(source))
    return Recipe(slot, program, tuple(sources), fake(output).device.type, class_dim, exact, names, graded)


def wants_gradient(source: Node) -> bool:
    return isinstance(fake(source), Tensor) and fake(source).requires_grad


def has_gradient(recipe: Recipe, sources: Sequence[Any]) -> bool:
    """Whether the result has a gradient.

    The inputs tell at run time: not every Dynamo recompiles when a head is frozen later.
    """
    computed = [at for at in recipe.graded if recipe.sources[at].op != "placeholder"]
    return any(sources[at].requires_grad for at in recipe.graded) and all(sources[at].requires_grad for at in computed)


def compute_now(recipe: Recipe, sources: Sequence[Any]) -> Tensor:
    """Compute the returned tensor in eager mode."""
    with torch.set_grad_enabled(has_gradient(recipe, sources)), torch.autocast(recipe.device, enabled=False):
        return recipe.program(*sources)


def redirect(graph: Graph, recipes: Sequence[Recipe]) -> Wrap:
    """Make the graph return the recipes' sources instead of their tensors.

    Returns a function that wraps the compiled graph and restores the original outputs.
    """
    output = graph.output_node()
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    returned: list[Any] = list(output.args[0])  # type: ignore[arg-type]
    by_slot = {r.slot: r for r in recipes}
    plain_outputs = [value for slot, value in enumerate(returned) if slot not in by_slot]
    extra = list(dict.fromkeys(s for r in recipes for s in r.sources if s.op != "placeholder"))
    output.args = ((*plain_outputs, *extra),)
    count = len(returned)
    # where each recipe finds its sources at run time: (True, index of an input) or (False, index of an output)
    plan = {
        r.slot: [
            (True, placeholders.index(s)) if s.op == "placeholder" else (False, len(plain_outputs) + extra.index(s))
            for s in r.sources
        ]
        for r in recipes
    }

    def wrap(compiled: Callable[..., Any], finish: Finish) -> Callable[..., Any]:
        def with_returned_logits(*inputs: Any) -> list[Any]:
            outputs = compiled(*inputs)
            results, plain = [], iter(outputs[: len(plain_outputs)])
            for slot in range(count):
                if slot in plan:
                    values = [inputs[i] if from_input else outputs[i] for from_input, i in plan[slot]]
                    results.append(finish(by_slot[slot], values))
                else:
                    results.append(next(plain))
            return results

        return with_returned_logits

    return wrap


def unwrapped(compiled: Callable[..., Any], finish: Finish) -> Callable[..., Any]:
    """The wrap of a compiled graph without redirected outputs: none."""
    return compiled


def computed_at_once(wrap: Wrap) -> Wrap:
    """A wrap that always computes returned logits right after the graph."""
    return lambda compiled, finish: wrap(compiled, compute_now)


def nested(outer: Wrap | None, inner: Wrap | None) -> Wrap | None:
    """Both wraps around a compiled graph, ``inner`` closer to it."""
    if outer is None or inner is None:
        return outer or inner
    return lambda compiled, finish: outer(inner(compiled, finish), finish)
