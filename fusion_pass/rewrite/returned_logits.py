"""Logits that the graph returns: the graph returns h instead, and the logits are computed from it outside.

A differentiable output of a compiled graph gets a gradient whether or not anyone uses it: AOTAutograd fills an
[N, V] tensor of zeros and multiplies it through the head twice. Computed outside the differentiated graph, in
eager mode, logits that nobody uses cost no backward, and used ones are exactly what the program would have got.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch.fx import Node

from fusedhead.analysis.body import Body
from fusedhead.analysis.site import Site, head_nodes, weights_of
from fusedhead.analysis.source_lines import place, products_of
from fusedhead.graph.nodes import fake
from fusedhead.graph.recipes import Recipe, program_of, recipe_of
from fusedhead.graph.weight_recipes import made_of_inputs
from fusedhead.ir.logits import logits_of


def note_lines(body: Body) -> None:
    """Note the line of each head, by which it is told from other products: while all of them are in the graph."""
    if body.decisions:
        products = products_of(body.graph)
        body.lines |= {site.head: place(site.head.node, products) for site, *_ in body.decisions}


def run(body: Body) -> None:
    """Redirect the outputs that are logits of fused heads."""
    if not any(site.outputs for site, *_ in body.fused()):
        return
    slots: Any = body.graph.output_node().args[0]
    recipes = [
        replace(
            recipe(site, slot, output, logits_of(body.reading.values[output]).class_dim),
            least=body.least[site.head],
            runs=(body.runs[site.head.node],),
        )
        for site, *_ in body.fused()
        for slot, output in enumerate(slots)
        if output in set(site.outputs)
    ]
    body.redirect(recipes)


def recipe(site: Site, slot: int, output: Node, class_dim: int) -> Recipe:
    """The recipe of a followed node that the graph returns in ``slot``."""
    nodes, sources = program_of([output], head_nodes(site))
    sizes: dict[Node, Sequence[Any]] = {
        product: tuple(fake(node).shape[-1] for node in (product, *product.all_input_nodes[:1]))  # [V, D]
        for product in site.head.products
    }
    for weight in weights_of(site):  # sizes of what it is made of belong to the head too
        for node in made_of_inputs(weight) or ():
            sizes[node] = [n for source in node.all_input_nodes for n in getattr(fake(source), "shape", ())]
    return recipe_of(nodes, sources, sizes, slot, output, class_dim)
