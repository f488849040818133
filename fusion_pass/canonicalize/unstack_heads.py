"""Logits of several heads, stacked and taken apart again: ``torch.stack([head(h) for head in heads], 1)[:, k]``.

Models with codebooks (MusicGen) stack their heads' logits, return the stack, and compute a loss for each. A part that
is read from the stack by its number is the head's own product, so it is read there; a stack that is only returned
besides is computed outside the differentiated graph (`returned`). What is left are heads like any other. This file
decides only whether the rewriting is exact; it knows no losses.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from fusedhead.analysis.projections import candidates
from fusedhead.graph.modes import grad_modes
from fusedhead.graph.nodes import every_dimension, fake, name_of
from fusedhead.legality.checks import Mutations
from fusedhead.rewrite import returned_logits
from fusedhead.rewrite.returned_logits import Wrap
from fusedhead.rules.projections import SPELLINGS

# What may lie between a stack and the graph's output: the same numbers in another arrangement or dtype.
ARRANGING = frozenset(
    {"getitem", "view", "reshape", "contiguous", "transpose", "permute", "flatten", "unflatten", "float", "to", "clone"}
)

Index = tuple[Any, ...]  # an integer or a slice for every dimension


@dataclass(eq=False)
class Taken:
    """What ``node`` reads from a stack: ``part``, indexed by one index after the other."""

    node: Node
    part: Node
    indices: tuple[Index, ...]


@dataclass(eq=False)
class Stack:
    """One stack of projections: what is taken from it by number, and what of it is only returned."""

    node: Node
    parts: tuple[Node, ...]
    taken: list[Taken]
    kept: list[Node]  # the stack, and what is made of it on the way to an output, in order
    outputs: list[Node]


def stacked(node: Node) -> tuple[tuple[Node, ...], int] | None:
    """The projections that a node stacks, and the dimension they are numbered in."""
    if node.op != "call_function" or name_of(node) != "stack" or not isinstance(fake(node), Tensor):
        return None
    parts = node.args[0] if node.args else node.kwargs.get("tensors")
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    if not isinstance(parts, (list, tuple)) or len(parts) < 2 or not isinstance(dim, int):
        return None
    if not all(isinstance(part, Node) and name_of(part) in SPELLINGS for part in parts):
        return None
    return tuple(parts), dim % fake(node).ndim  # type: ignore[return-value]


def read(node: Node) -> Stack | None:
    """What the graph does with a stack of projections, or None if that is more than taking apart and returning."""
    known = stacked(node)
    if known is None:
        return None
    parts, dim = known
    found = Stack(node, parts, [], [node], [])
    # the stack and what is still numbered like it: in which dimension, and how the parts were indexed until then
    numbered: dict[Node, tuple[int, tuple[Index, ...]]] = {node: (dim, ())}
    for user in following(node):
        made_of = [source for source in user.all_input_nodes if source in found.kept]
        if not made_of:
            continue
        if user.op == "output":
            found.outputs = made_of
            continue
        if len(user.all_input_nodes) != 1 or name_of(user) not in ARRANGING:
            return None
        index = index_of(user) if made_of[0] in numbered else None
        if index is None:
            found.kept.append(user)
            continue
        at, done = numbered[made_of[0]]
        number, rest = index[at], (*done, (*index[:at], *index[at + 1 :]))
        if isinstance(number, int):
            found.taken.append(Taken(user, parts[number], rest))
            continue
        found.kept.append(user)
        if number == slice(None):
            numbered[user] = at - sum(isinstance(entry, int) for entry in index[:at]), rest
    return found


def following(node: Node) -> Iterable[Node]:
    """The nodes after one, in order."""
    while node.next.op != "root":
        node = node.next
        yield node


def index_of(node: Node) -> Index | None:
    """The index of a ``getitem``, or None if it is none or holds anything but integers and slices of numbers."""
    if name_of(node) != "getitem" or len(node.all_input_nodes) != 1:
        return None
    entries = every_dimension(node.args[1], fake(node.all_input_nodes[0]).ndim)
    return tuple(entries) if all(type(entry) is int or isinstance(entry, slice) for entry in entries) else None


def exact(found: Stack, mutations: Mutations, recorded: dict[Node, bool]) -> bool:
    """Whether every part may be read from its own head, and the rest be computed when the graph has run."""
    nodes = [*found.parts, *found.kept, *(taken.node for taken in found.taken)]
    if mutations.anywhere_after(min(found.parts), nodes) is not None:  # type: ignore[type-var]
        return False
    if not found.outputs:
        return True
    values = [fake(output) for output in found.outputs]
    vocab = fake(found.node).shape[-1]
    making, sources = returned_logits.program_of(found.outputs, {*found.kept, *found.parts})
    return (
        all(recorded[node] for node in making)
        and fake(found.node).requires_grad
        and all(value.shape[-1:] == (vocab,) for value in values)
        and mutations.anywhere_after(making[0], sources) is None
    )


def separate(graph: Graph) -> Wrap | None:
    """Take the graph's stacks of heads apart, in place. Returns what must be put around the compiled graph, if any."""
    if not any(stacked(node) for node in graph.nodes):
        return None
    heads = candidates(graph)
    recorded, mutations = grad_modes(graph), Mutations(graph)
    found = [read(node) for node in graph.nodes]
    useful = [s for s in found if s and s.taken and heads.issuperset(s.parts) and exact(s, mutations, recorded)]
    recipes = []
    output = graph.output_node()
    for stack in useful:
        take_apart(stack, recorded)
        making: list[Node] = []
        sources: list[Node] = []
        if stack.outputs:
            making, sources = returned_logits.program_of(stack.outputs, {*stack.kept, *stack.parts})
        recipes += [
            returned_logits.recipe_of(making, sources, sizes(stack), slot, node, fake(node).ndim - 1)
            for slot, node in enumerate(output.args[0])  # type: ignore[arg-type]
            if node in stack.outputs
        ]
    wrap = returned_logits.redirect(graph, recipes) if recipes else None
    for stack in useful:
        for node in reversed(stack.kept):
            graph.erase_node(node)
    if useful:
        graph.lint()
        graph.owning_module.recompile()
    return wrap


def sizes(stack: Stack) -> dict[Node, tuple[Any, ...]]:
    """The sizes [V, D] that belong to each head."""
    return {part: tuple(fake(n).shape[-1] for n in (part, *part.all_input_nodes)) for part in stack.parts}


def take_apart(stack: Stack, recorded: dict[Node, bool]) -> None:
    """Let what is taken from the stack be read from the parts."""
    graph = stack.node.graph
    for taken in stack.taken:
        source = taken.part
        with graph.inserting_before(taken.node), torch.set_grad_enabled(recorded[taken.node]):
            for index in taken.indices:
                if all(entry == slice(None) for entry in index):
                    continue
                value = fake(source)[index]
                source = graph.call_function(operator.getitem, (source, index))
                source.meta = {**taken.node.meta, "example_value": value}
        taken.node.replace_all_uses_with(source)
        graph.erase_node(taken.node)
