"""Returned logits: the graph returns h instead, and the logits are computed from it outside of the graph.

A differentiable output of a compiled graph gets a gradient whether or not anyone uses it: AOTAutograd fills an [N, V]
tensor of zeros and multiplies it through the head twice. Outside of the differentiated graph, in eager mode, unused
logits cost no backward, and used ones equal the program's.
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
    """Note the source line of each head. The line must tell it from all products, which are still in the graph."""
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
    """The recipe of a followed node that the graph returns as output ``slot``."""
    nodes, sources = program_of([output], head_nodes(site))
    sizes: dict[Node, Sequence[Any]] = {
        product: tuple(fake(node).shape[-1] for node in (product, *product.all_input_nodes[:1]))  # [V, D]
        for product in site.head.products
    }
    for weight in weights_of(site):  # sizes of the weight's sources are sizes of the head too
        for node in made_of_inputs(weight) or ():
            sizes[node] = [n for source in node.all_input_nodes for n in getattr(fake(source), "shape", ())]
    return recipe_of(nodes, sources, sizes, slot, output, class_dim)
