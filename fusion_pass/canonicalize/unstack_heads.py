"""Reads of stacked logits by index become reads of one head: ``torch.stack([head(h) for head in heads], 1)[:, k]``.

Models with codebooks (MusicGen) stack their heads' logits, return the stack, and compute a loss for each. An indexed
read of the stack is the product of one head, and reads it directly. A stack that is returned besides is computed
outside of the differentiated graph (`graph.recipes`).
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from fusedhead.analysis.body import Body
from fusedhead.analysis.projections import candidates
from fusedhead.graph.edit import replace_node
from fusedhead.graph.facts import GraphFacts
from fusedhead.graph.nodes import every_dimension, fake, name_of
from fusedhead.graph.op_names import ARRANGES, PROJECTIONS, joined_parts
from fusedhead.graph.recipes import program_of, recipe_of

Index = tuple[Any, ...]  # an integer or a slice for every dimension


@dataclass(eq=False)
class StackRead:
    """A read of a stack by ``node``: ``part``, indexed by one index after the other."""

    node: Node
    part: Node
    indices: tuple[Index, ...]


@dataclass(eq=False)
class StackUse:
    """The uses of one stack of projections: indexed reads, and outputs."""

    node: Node
    parts: tuple[Node, ...]
    reads: list[StackRead]
    arranged: list[Node]  # the stack, and the nodes between it and an output, in order
    outputs: list[Node]


def stacked_projections(node: Node) -> tuple[tuple[Node, ...], int] | None:
    """The projections that a node stacks, and the stacked dimension."""
    joined = joined_parts(node) if node.op == "call_function" and name_of(node) == "stack" else None
    if joined is None or not all(name_of(part) in PROJECTIONS for part in joined[0]):
        return None
    return tuple(joined[0]), joined[1]


def use_of(node: Node) -> StackUse | None:
    """The uses of a stack of projections; None if it has uses besides indexed reads and outputs."""
    stacked = stacked_projections(node)
    if stacked is None:
        return None
    parts, dim = stacked
    use = StackUse(node, parts, [], [node], [])
    # The stack and its views that are still indexed by head: the dimension, and the indices taken of the parts so far.
    numbered: dict[Node, tuple[int, tuple[Index, ...]]] = {node: (dim, ())}
    for user in nodes_after(node):
        sources = [source for source in user.all_input_nodes if source in use.arranged]
        if not sources:
            continue
        if user.op == "output":
            use.outputs = sources
            continue
        if len(user.all_input_nodes) != 1 or name_of(user) not in ARRANGES:
            return None
        index = index_of(user) if sources[0] in numbered else None
        if index is None:
            use.arranged.append(user)
            continue
        at, indices = numbered[sources[0]]
        number, rest = index[at], (*indices, (*index[:at], *index[at + 1 :]))
        if isinstance(number, int):
            use.reads.append(StackRead(user, parts[number], rest))
            continue
        use.arranged.append(user)
        if number == slice(None):
            numbered[user] = at - sum(isinstance(entry, int) for entry in index[:at]), rest
    return use


def nodes_after(node: Node) -> Iterable[Node]:
    """The nodes after one, in order."""
    while node.next.op != "root":
        node = node.next
        yield node


def index_of(node: Node) -> Index | None:
    """The index of a ``getitem``; None for another node, and for an index that holds tensors."""
    if name_of(node) != "getitem" or len(node.all_input_nodes) != 1:
        return None
    entries = every_dimension(node.args[1], fake(node.all_input_nodes[0]).ndim)
    return tuple(entries) if all(type(entry) is int or isinstance(entry, slice) for entry in entries) else None


def is_exact(use: StackUse, facts: GraphFacts) -> bool:
    """Whether reading each part from its own head is exact, and so is computing the outputs after the graph."""
    nodes = [*use.parts, *use.arranged, *(read.node for read in use.reads)]
    if facts.write_after(min(use.parts), nodes) is not None:  # type: ignore[type-var]
        return False
    if not use.outputs:
        return True
    values = [fake(output) for output in use.outputs]
    vocab = fake(use.node).shape[-1]
    makers, sources = program_of(use.outputs, {*use.arranged, *use.parts})
    return (
        all(map(facts.grad_mode, makers))
        and fake(use.node).requires_grad
        and all(value.shape[-1:] == (vocab,) for value in values)
        and facts.write_after(makers[0], sources) is None
    )


def run(body: Body) -> None:
    """Replace the indexed reads of the graph's stacks."""
    graph, facts = body.graph, body.facts
    uses = [use for node in graph.nodes if (use := use_of(node)) is not None and use.reads]
    heads = candidates(facts) if uses else set()
    uses = [use for use in uses if heads.issuperset(use.parts) and is_exact(use, facts)]
    recipes = []
    slots: Any = graph.output_node().args[0]
    for use in uses:
        read_parts(use, facts)
        if use.outputs:
            makers, sources = program_of(use.outputs, {*use.arranged, *use.parts})
            recipes += [
                recipe_of(makers, sources, sizes(use), slot, node, fake(node).ndim - 1)
                for slot, node in enumerate(slots)
                if node in use.outputs
            ]
    body.redirect(recipes)
    for use in uses:
        for node in reversed(use.arranged):
            graph.erase_node(node)


def sizes(use: StackUse) -> dict[Node, tuple[Any, ...]]:
    """The sizes [V, D] of each head."""
    return {part: tuple(fake(n).shape[-1] for n in (part, *part.all_input_nodes)) for part in use.parts}


def read_parts(use: StackUse, facts: GraphFacts) -> None:
    """Let the indexed reads read the parts."""
    graph = use.node.graph
    for read in use.reads:
        source = read.part
        with graph.inserting_before(read.node), torch.set_grad_enabled(facts.grad_mode(read.node)):
            for index in read.indices:
                if all(entry == slice(None) for entry in index):
                    continue
                value = fake(source)[index]
                source = graph.call_function(operator.getitem, (source, index))
                source.meta = {**read.node.meta, "example_value": value}
        replace_node(read.node, source)
