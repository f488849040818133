"""Returned stacks: a stack of heads that the graph only returns leaves the graph, which returns its sources instead.

The stack is computed outside of the differentiated graph (`graph.recipes`) and returned deferred: a loss on ``z[:, k]``
is then a loss on one head.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from fusedhead.analysis.body import Body
from fusedhead.analysis.returned_stacks import program_of_stack
from fusedhead.graph.edit import erase
from fusedhead.graph.nodes import fake
from fusedhead.graph.recipes import recipe_of
from fusedhead.graph.weight_recipes import making
from fusedhead.ir.expr import nodes_of
from fusedhead.ir.logits import Projection


def run(body: Body) -> None:
    """Redirect the outputs of deferred stacks."""
    slots: Any = body.graph.output_node().args[0]
    recipes, replaced = [], []
    for stack in body.returned_stacks:
        makers, sources = program_of_stack(stack)
        sizes = {node: [n for x in (node, *node.all_input_nodes) for n in sizes_of_a_head(x)] for node in makers}
        node = stack.head.node
        sizes[node] = [*sizes[node], len(stack.head.parts)]  # the index of a head is no token index
        heads = {part.head.node: part.head for part in stack.head.parts}
        runs = tuple(body.runs[product] for product in heads)
        weights = tuple(tensors_of(head, sources) for head in heads.values())
        recipes += [
            replace(recipe_of(makers, sources, sizes, slot, node, fake(node).ndim - 1), runs=runs, weights=weights)
            for slot, node in enumerate(slots)
            if node in stack.outputs
        ]
        replaced += makers
    body.redirect(recipes)
    erase(reversed(replaced), set(replaced).__contains__)


def tensors_of(head: Projection, sources: list[Node]) -> frozenset[int]:
    """The indices, among a recipe's tensor sources, of those that a head's weight is made of."""
    weight = nodes_of([head.weight])
    makers = {*weight, *(source for node in making(weight) for source in node.all_input_nodes)}
    tensors = [source for source in sources if isinstance(fake(source), torch.Tensor)]
    return frozenset(at for at, source in enumerate(tensors) if source in makers)


def sizes_of_a_head(node: Node) -> tuple[Any, ...]:
    """The sizes of a tensor that are sizes of a head: all of a weight's, the last of any other tensor's."""
    value = fake(node)
    if not isinstance(value, torch.Tensor):
        return ()
    return tuple(value.shape) if isinstance(value, torch.nn.Parameter) else tuple(value.shape[-1:])
