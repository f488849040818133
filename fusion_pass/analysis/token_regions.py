"""Which nodes of a graph a row program takes the place of: what belongs to it, and what it returns.

A `Region` holds every node whose logits-wide value no statistic gives, of one head or of several that meet. Its
results are the small values that the rest of the graph reads. This file neither decides about safety nor emits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from fusedhead.analysis.interpreter import Reading
from fusedhead.compat import tree_leaves
from fusedhead.graph.effects import writes
from fusedhead.ir.logits import Projection, leaves, sources_of
from fusedhead.ir.tokenwise import RowCall, RowLeaf, Rowwise, Seed, parts
from fusedhead.rewrite.statistics import erase


@dataclass(eq=False)
class Region:
    """Rowwise nodes of heads that meet, and what the graph needs of them."""

    heads: set[Projection]
    inside: list[Node] = field(default_factory=list)  # nodes that the call replaces
    results: list[tuple[Node, Any]] = field(default_factory=list)  # nodes to be given a value: Rowwise or Plain

    @property
    def outputs(self) -> list[Rowwise]:
        """The values that leave the row program, each once."""
        found = {id(p.expr): p for _, value in self.results for p in parts(value)}
        return list(found.values())

    @property
    def computes(self) -> str:
        names = dict.fromkeys(name for out in self.outputs for name in sorted(calls(out.expr)))
        shown = [n for n in names if n not in QUIET]
        return f"rowwise({', '.join(shown[:4])}{', ...' if len(shown) > 4 else ''})"


QUIET = frozenset(
    {"to", "mul", "add", "sub", "div", "sum", "neg", "reshape", "unsqueeze", "detach", "getitem", "squeeze"}
)  # too common to tell anything in a report


def calls(expr: Any) -> set[str]:
    """The names of the ops of an expression."""
    found, stack, seen = set(), [expr], set()
    while stack:
        x = stack.pop()
        if isinstance(x, RowCall) and id(x) not in seen:
            seen.add(id(x))
            packet = getattr(x.op, "_overloadpacket", x.op)
            found.add(getattr(packet, "__name__", str(packet)).strip("_"))
            stack += tree_leaves(x.args)
    return found


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


def regions(reading: Reading) -> list[Region]:
    """Every region of a graph, heads that meet in one value together."""
    found: list[Region] = []
    for node, value in reading.rowwise.items():
        heads = {head for part in parts(value) for head in part.heads}
        meeting = [r for r in found if r.heads & heads]
        joined = Region(heads.union(*(r.heads for r in meeting)))
        for r in meeting:
            joined.inside += r.inside
            found.remove(r)
        joined.inside.append(node)
        found.append(joined)
    idle = unused(reading)
    for region in found:
        settle(region, reading, idle)
    return [r for r in found if r.results]


def unused(reading: Reading) -> set[Node]:
    """What leads to nothing: as a result its operands would get gradients of zeros, where eager code has none."""
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
            return any(part.heads & heads for part in parts(value))
        a_result = isinstance(value, Rowwise) and value.small
        return not a_result and all(part.heads <= heads for part in parts(value))

    nodes = [node for node, value in reading.rowwise.items() if not node._erased and may_go(node, value)]
    erase(reversed(nodes), set(nodes).__contains__)


def settle(region: Region, reading: Reading, idle: set[Node]) -> None:
    """Keep what only the row program can compute; what hangs on its small results alone stays in the graph.

    ``idle``: what leads to nothing goes without being a result.
    """
    values = reading.rowwise

    def unfit(node: Node) -> bool:
        """Whether a node's value cannot be handed out: as wide as the logits, or a tuple."""
        value = values.get(node)
        return isinstance(value, (list, tuple)) or (isinstance(value, Rowwise) and not value.small)

    inner: set[Node] = set()
    for node in reversed(region.inside):
        # a total is no part of a row program: what reads it reads a tensor from outside
        if unfit(node) or (isinstance(values[node], Rowwise) and any(user in inner for user in node.users)):
            inner.add(node)
    for node in region.inside:
        if node in idle:
            continue
        followed = any(s in reading.values and s not in values for s in node.all_input_nodes)
        first = followed or any(unfit(s) for s in node.all_input_nodes)
        if (node not in inner and first) or (
            node in inner and not unfit(node) and any(user not in inner for user in node.users)
        ):
            region.results.append((node, values[node]))
    made = inner.union(idle.intersection(region.inside), (node for node, _ in region.results))
    region.inside = [node for node in region.inside if node in made]


def reads(values: Iterable[Rowwise]) -> list[Node]:
    """The graph's nodes that row programs of these values read, besides hidden states and weights."""
    seeds, outside = leaves_of(values)
    vectors = [v for seed in seeds for v in (*seed.logits.cols, *(r.value for r in seed.logits.rows))]
    return leaves([*(x.value for x in outside), *vectors])


def operands_of(values: Iterable[Rowwise]) -> list[Node]:
    """The graph's nodes that calls for row programs of these values are made of."""
    seeds, outside = leaves_of(values)
    return leaves(x.value for x in outside) + [node for seed in seeds for node in sources_of(seed.logits)]
