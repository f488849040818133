"""Token regions: the nodes of a graph that a token program replaces, and the results that it returns.

A `Region` holds every node that is as wide as the logits and that no statistic gives, of one head or of several that
meet. Its results are the small values that the rest of the graph reads.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch.fx import Node

from fusedhead.analysis.body import Body
from fusedhead.analysis.site import Reading, Region
from fusedhead.graph.edit import erase
from fusedhead.graph.effects import writes
from fusedhead.graph.sizes import same_size
from fusedhead.ir.expr import nodes_of
from fusedhead.ir.logits import Projection, sources_of
from fusedhead.ir.tokenwise import TokenValue, inputs_of, token_values_of


def differentiated(values: Iterable[TokenValue]) -> set[int]:
    """The logits and outside tensors that a gradient reaches, by identity. A path through ``detach`` carries none."""
    numbers = (value for value in values if value.val.is_floating_point())
    heads, outside = inputs_of(numbers, lambda call: call.op is not torch.ops.aten.detach.default)
    return {*(id(head.logits) for head in heads), *map(id, outside)}


def run(body: Body) -> None:
    """Find the token programs that the heads of a body meet in."""
    body.regions = {head: region for region in regions(body.reading) for head in region.heads}


def regions(reading: Reading) -> list[Region]:
    """Every region of a graph. Heads that meet in one value share a region. Computed once for a reading."""
    if reading.regions is None:
        reading.regions = found_regions(reading)
    return reading.regions


def found_regions(reading: Reading) -> list[Region]:
    merged: list[Region] = []
    for node, value in reading.tokenwise.items():
        heads = {head for part in token_values_of(value) for head in part.heads}
        meeting = [r for r in merged if r.heads & heads]
        joined = Region(heads.union(*(r.heads for r in meeting)))
        for r in meeting:
            joined.inside += r.inside
            merged.remove(r)
        joined.inside.append(node)
        merged.append(joined)
    dead = dead_nodes(reading)
    for region in merged:
        select_results(region, reading, dead)
    return [r for r in merged if r.results]


def dead_nodes(reading: Reading) -> set[Node]:
    """Dead nodes, whose value nobody reads.

    Returning them would give their operands zero gradients where eager code gives None.
    """
    unread: set[Node] = set()
    for node in reversed(reading.tokenwise):
        if all(user in unread for user in node.users) and not writes(node):
            unread.add(node)
    return unread


def erase_unused(reading: Reading, heads: set[Projection]) -> None:
    """Erase the dead nodes that are computed token by token from one of these heads.

    A write to a small result counts as read where that result is read.
    """

    def may_go(node: Node, value: Any) -> bool:
        if not writes(node):
            return any(part.heads & heads for part in token_values_of(value))
        a_result = isinstance(value, TokenValue) and value.small
        return not a_result and all(part.heads <= heads for part in token_values_of(value))

    nodes = [node for node, value in reading.tokenwise.items() if not node._erased and may_go(node, value)]
    erase(reversed(nodes), set(nodes).__contains__)


def select_results(region: Region, reading: Reading, dead: set[Node]) -> None:
    """Split a region: ops as wide as the vocabulary go into the program; ops on its small results stay in the graph.

    ``dead`` nodes are removed and are no result.
    """
    values = reading.tokenwise

    def too_wide_to_return(node: Node) -> bool:
        """Whether a node's value cannot be returned: it is as wide as the logits, or a tuple."""
        value = values.get(node)
        return isinstance(value, (list, tuple)) or (isinstance(value, TokenValue) and not value.small)

    interior: set[Node] = set()
    for node in reversed(region.inside):
        # a total over tokens is no part of a token program, whose nodes read it as a tensor from outside
        read_inside = any(user in interior for user in node.users)
        if too_wide_to_return(node) or (isinstance(values[node], TokenValue) and read_inside):
            interior.add(node)
    for node in region.inside:
        if node in dead:
            continue
        followed = any(s in reading.values and s not in values for s in node.all_input_nodes)
        first = followed or any(too_wide_to_return(s) for s in node.all_input_nodes)
        if (node not in interior and first) or (
            node in interior and not too_wide_to_return(node) and any(user not in interior for user in node.users)
        ):
            region.results.append((node, values[node]))
    computed = interior.union(dead.intersection(region.inside), (node for node, _ in region.results))
    region.inside = [node for node in region.inside if node in computed]


def operands_from_outside(values: Iterable[TokenValue]) -> list[Node]:
    """The graph's nodes that token programs of these values read besides hidden states and weights."""
    heads, outside = inputs_of(values)
    vectors = [v for head in heads for v in (*head.logits.cols, *(r.value for r in head.logits.rows))]
    return nodes_of([*(x.value for x in outside), *vectors])


def program_operands(values: Iterable[TokenValue]) -> list[Node]:
    """The graph's nodes that are operands of the calls of these token programs."""
    heads, outside = inputs_of(values)
    return nodes_of(x.value for x in outside) + [node for head in heads for node in sources_of(head.logits)]


def by_tokens(outputs: Iterable[TokenValue]) -> list[list[TokenValue]]:
    """Values grouped by their number of tokens, since one call walks over the tokens once."""
    groups: list[tuple[Any, list[TokenValue]]] = []
    for out in outputs:
        tokens = math.prod(s for s, is_tail in zip(out.val.shape, out.tail) if not is_tail)
        for size, group in groups:
            if same_size(size, tokens):
                group.append(out)
                break
        else:
            groups.append((tokens, [out]))
    return [group for _, group in groups]
