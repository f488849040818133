"""Which nodes of a graph a row program takes the place of: what belongs to it, and what it returns.

A `Region` holds every node whose logits-wide value no statistic gives, of one head or of several that meet. Its
results are the small values that the rest of the graph reads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.fx import Node

from fusedhead.analysis.body import Body
from fusedhead.analysis.site import Reading, Region
from fusedhead.compat import tree_leaves
from fusedhead.graph.edit import erase
from fusedhead.graph.effects import writes
from fusedhead.ir.logits import Projection, leaves, sources_of
from fusedhead.ir.tokenwise import RowCall, RowLeaf, Rowwise, Seed, parts
from fusedhead.rules.tokenwise.operands import same


def leaves_of(
    values: Iterable[Rowwise], through: Callable[[RowCall], bool] = lambda call: True
) -> tuple[list[Seed], list[RowLeaf]]:
    """The heads and outside tensors that expressions read, each once, in order of appearance.

    ``through``: whether to follow what a call reads.
    """
    seeds: dict[int, Seed] = {}
    outside: dict[int, RowLeaf] = {}
    seen: set[int] = set()

    def visit(x: Any) -> None:
        if id(x) in seen:
            return
        seen.add(id(x))
        if isinstance(x, Seed):
            seeds.setdefault(id(x.logits), x)
        elif isinstance(x, RowLeaf):
            outside[id(x)] = x
        elif isinstance(x, RowCall) and through(x):
            for a in tree_leaves((x.args, x.kwargs)):
                visit(a)

    for value in values:
        visit(value.expr)
    return list(seeds.values()), list(outside.values())


def differentiated(values: Iterable[Rowwise]) -> set[int]:
    """Identities of the logits and outside tensors that a gradient reaches: not through ``detach`` alone."""
    numbers = (value for value in values if value.val.is_floating_point())
    seeds, outside = leaves_of(numbers, lambda call: call.op is not torch.ops.aten.detach.default)
    return {*(id(seed.logits) for seed in seeds), *map(id, outside)}


def run(body: Body) -> None:
    """Find the token programs that the heads of a body meet in."""
    body.regions = {head: region for region in regions(body.reading) for head in region.heads}


def regions(reading: Reading) -> list[Region]:
    """Every region of a graph, heads that meet in one value together; found once for a reading."""
    if reading.regions is None:
        reading.regions = found_regions(reading)
    return reading.regions


def found_regions(reading: Reading) -> list[Region]:
    merged: list[Region] = []
    for node, value in reading.tokenwise.items():
        heads = {head for part in parts(value) for head in part.heads}
        meeting = [r for r in merged if r.heads & heads]
        joined = Region(heads.union(*(r.heads for r in meeting)))
        for r in meeting:
            joined.inside += r.inside
            merged.remove(r)
        joined.inside.append(node)
        merged.append(joined)
    dead_nodes = dead(reading)
    for region in merged:
        select_results(region, reading, dead_nodes)
    return [r for r in merged if r.results]


def dead(reading: Reading) -> set[Node]:
    """Dead nodes. Returning them would give their operands zero gradients where eager gives None."""
    unread: set[Node] = set()
    for node in reversed(reading.tokenwise):
        if all(user in unread for user in node.users) and not writes(node):
            unread.add(node)
    return unread


def erase_unused(reading: Reading, heads: set[Projection]) -> None:
    """Remove what is computed from one of these heads, token by token, and read by nobody, in place or not.

    A write to a small result is read through that result's name.
    """

    def may_go(node: Node, value: Any) -> bool:
        if not writes(node):
            return any(part.heads & heads for part in parts(value))
        a_result = isinstance(value, Rowwise) and value.small
        return not a_result and all(part.heads <= heads for part in parts(value))

    nodes = [node for node, value in reading.tokenwise.items() if not node._erased and may_go(node, value)]
    erase(reversed(nodes), set(nodes).__contains__)


def select_results(region: Region, reading: Reading, dead_nodes: set[Node]) -> None:
    """Split a region: ops as wide as the vocabulary go into the program, ops on its small results stay in the graph.

    ``dead_nodes`` go without being a result.
    """
    values = reading.tokenwise

    def too_wide_to_return(node: Node) -> bool:
        """Whether a node's value cannot be handed out: as wide as the logits, or a tuple."""
        value = values.get(node)
        return isinstance(value, (list, tuple)) or (isinstance(value, Rowwise) and not value.small)

    interior: set[Node] = set()
    for node in reversed(region.inside):
        # a total is no part of a row program: what reads it reads a tensor from outside
        read_inside = any(user in interior for user in node.users)
        if too_wide_to_return(node) or (isinstance(values[node], Rowwise) and read_inside):
            interior.add(node)
    for node in region.inside:
        if node in dead_nodes:
            continue
        followed = any(s in reading.values and s not in values for s in node.all_input_nodes)
        first = followed or any(too_wide_to_return(s) for s in node.all_input_nodes)
        if (node not in interior and first) or (
            node in interior and not too_wide_to_return(node) and any(user not in interior for user in node.users)
        ):
            region.results.append((node, values[node]))
    computed = interior.union(dead_nodes.intersection(region.inside), (node for node, _ in region.results))
    region.inside = [node for node in region.inside if node in computed]


def operands_from_outside(values: Iterable[Rowwise]) -> list[Node]:
    """The graph's nodes that row programs of these values read, besides hidden states and weights."""
    seeds, outside = leaves_of(values)
    vectors = [v for seed in seeds for v in (*seed.logits.cols, *(r.value for r in seed.logits.rows))]
    return leaves([*(x.value for x in outside), *vectors])


def operands_of(values: Iterable[Rowwise]) -> list[Node]:
    """The graph's nodes that calls for row programs of these values are made of."""
    seeds, outside = leaves_of(values)
    return leaves(x.value for x in outside) + [node for seed in seeds for node in sources_of(seed.logits)]


def by_tokens(outputs: Iterable[Rowwise]) -> list[list[Rowwise]]:
    """Values with as many tokens together: one call walks over the tokens once."""
    groups: list[tuple[Any, list[Rowwise]]] = []
    for out in outputs:
        tokens = math.prod(s for s, is_tail in zip(out.val.shape, out.tail) if not is_tail)
        for size, group in groups:
            if same(size, tokens):
                group.append(out)
                break
        else:
            groups.append((tokens, [out]))
    return [group for _, group in groups]
