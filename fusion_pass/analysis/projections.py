"""Candidate projections: the products that a loss or a reduction is computed from. Only names and edges are read."""

from __future__ import annotations

from collections.abc import Collection

from torch.fx import Node

from fusedhead.graph.facts import GraphFacts
from fusedhead.graph.nodes import name_of
from fusedhead.graph.op_names import HEAD_ENDS, PROJECTIONS


def above_losses(facts: GraphFacts, products: Collection[str] = PROJECTIONS) -> list[Node]:
    """The nodes between losses and the first product on every path, with the products, the nearest first."""
    above: dict[Node, None] = {}
    stack = facts.named(HEAD_ENDS)
    while stack:
        for source in stack.pop().all_input_nodes:
            if source not in above and source.op.startswith("call_"):
                above[source] = None
                if name_of(source) not in products:
                    stack.append(source)
    return list(above)


def candidates(facts: GraphFacts) -> set[Node]:
    """The projections that reach a loss through no other projection."""
    return {node for node in above_losses(facts) if name_of(node) in PROJECTIONS}
