"""Which nodes of a graph a row program takes the place of: what belongs to it, and what it returns.

A `Region` holds every node whose logits-wide value no statistic gives, of one head or of several that meet. Its
results are the small values that the rest of the graph reads. This file neither decides about safety nor emits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from fusedhead.analysis.interpreter import Reading
from fusedhead.graph.effects import writes
from fusedhead.graph.sizes import same_size
from fusedhead.ir.expr import Expr, nodes_of, walk
from fusedhead.ir.logits import Projection, sources_of
from fusedhead.ir.tokenwise import TokenValue, inputs_of, token_values_of
from fusedhead.rewrite.statistics import erase


@dataclass(eq=False)
class Region:
    """Rowwise nodes of heads that meet, and what the graph needs of them."""

    heads: set[Projection]
    inside: list[Node] = field(default_factory=list)  # nodes that the call replaces
    results: list[tuple[Node, Any]] = field(default_factory=list)  # nodes to be given a value: TokenValue or Plain

    @property
    def outputs(self) -> list[TokenValue]:
        """The values that leave the row program, each once."""
        found = {id(p.expr): p for _, value in self.results for p in token_values_of(value)}
        return list(found.values())

    @property
    def computes(self) -> str:
        names = dict.fromkeys(name for out in self.outputs for name in ops(out.expr))
        shown = [n for n in names if n not in UNREMARKABLE_OPS]
        return f"rowwise({', '.join(shown[:4])}{', ...' if len(shown) > 4 else ''})"


UNREMARKABLE_OPS = frozenset(
    {"to", "mul", "add", "sub", "div", "sum", "neg", "reshape", "unsqueeze", "detach", "getitem", "squeeze"}
)  # too common to tell anything in a report


def ops(expr: Any) -> list[str]:
    """The names of the ops of an expression, sorted."""
    packets = {getattr(x.op, "_overloadpacket", x.op) for x in walk(expr) if isinstance(x, Expr)}
    return sorted({getattr(packet, "__name__", str(packet)).strip("_") for packet in packets})


def differentiated(values: Iterable[TokenValue]) -> set[int]:
    """Identities of the logits and outside tensors that a gradient reaches: not through ``detach`` alone."""
    numbers = (value for value in values if value.val.is_floating_point())
    heads, outside = inputs_of(numbers, lambda call: call.op is not torch.ops.aten.detach.default)
    return {*(id(head.logits) for head in heads), *map(id, outside)}


def regions(reading: Reading) -> list[Region]:
    """Every region of a graph, heads that meet in one value together."""
    found: list[Region] = []
    for node, value in reading.rowwise.items():
        heads = {head for part in token_values_of(value) for head in part.heads}
        meeting = [r for r in found if r.heads & heads]
        joined = Region(heads.union(*(r.heads for r in meeting)))
        for r in meeting:
            joined.inside += r.inside
            found.remove(r)
        joined.inside.append(node)
        found.append(joined)
    dead = dead_nodes(reading)
    for region in found:
        select_results(region, reading, dead)
    return [r for r in found if r.results]


def dead_nodes(reading: Reading) -> set[Node]:
    """Nodes whose value nobody reads.

    Returned by a program, they would give their operands zero gradients where eager code gives None.
    """
    found: set[Node] = set()
    for node in reversed(reading.rowwise):
        if all(user in found for user in node.users) and not writes(node):
            found.add(node)
    return found


def erase_unused(reading: Reading, heads: set[Projection]) -> None:
    """Remove what is computed from one of these heads, token by token, and read by nobody, in place or not.

    A write to a small result is read through that result's name.
    """

    def may_go(node: Node, value: Any) -> bool:
        if not writes(node):
            return any(part.heads & heads for part in token_values_of(value))
        a_result = isinstance(value, TokenValue) and value.small
        return not a_result and all(part.heads <= heads for part in token_values_of(value))

    nodes = [node for node, value in reading.rowwise.items() if not node._erased and may_go(node, value)]
    erase(reversed(nodes), set(nodes).__contains__)


def select_results(region: Region, reading: Reading, dead: set[Node]) -> None:
    """Split a region: ops as wide as the vocabulary go into the program; ops on its small results stay in the graph.

    ``dead`` nodes go without being a result.
    """
    values = reading.rowwise

    def too_wide_to_return(node: Node) -> bool:
        """Whether a node's value cannot be handed out: as wide as the logits, or a tuple."""
        value = values.get(node)
        return isinstance(value, (list, tuple)) or (isinstance(value, TokenValue) and not value.small)

    interior: set[Node] = set()
    for node in reversed(region.inside):
        # a total is no part of a row program: what reads it reads a tensor from outside
        if too_wide_to_return(node) or (
            isinstance(values[node], TokenValue) and any(user in interior for user in node.users)
        ):
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
    made = interior.union(dead.intersection(region.inside), (node for node, _ in region.results))
    region.inside = [node for node in region.inside if node in made]


def by_tokens(outputs: Iterable[TokenValue]) -> list[list[TokenValue]]:
    """Values with as many tokens together: one call walks over the tokens once."""
    found: list[tuple[Any, list[TokenValue]]] = []
    for out in outputs:
        tokens = math.prod(s for s, is_tail in zip(out.val.shape, out.tail) if not is_tail)
        for known, some in found:
            if same_size(known, tokens):
                some.append(out)
                break
        else:
            found.append((tokens, [out]))
    return [some for _, some in found]


def reads(values: Iterable[TokenValue]) -> list[Node]:
    """The graph's nodes that row programs of these values read, besides hidden states and weights."""
    heads, outside = inputs_of(values)
    vectors = [v for head in heads for v in (*head.logits.cols, *(r.value for r in head.logits.rows))]
    return nodes_of([*(x.value for x in outside), *vectors])


def operands_of(values: Iterable[TokenValue]) -> list[Node]:
    """The graph's nodes that calls for row programs of these values are made of."""
    heads, outside = inputs_of(values)
    return nodes_of(x.value for x in outside) + [node for head in heads for node in sources_of(head.logits)]
