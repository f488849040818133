"""The results of an interpretation: a `Site` for each projection and a `Region` for each token program, in one
`Reading`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch.fx import Node

from fusedhead.graph.nodes import fake
from fusedhead.graph.reasons import Refusal
from fusedhead.graph.weight_recipes import made_of_inputs, making
from fusedhead.ir.expr import Expr, nodes_of, walk
from fusedhead.ir.logits import Projection, StackedProjection
from fusedhead.ir.terminal import Terminal
from fusedhead.ir.tokenwise import TokenValue, token_values_of


@dataclass(eq=False)
class Site:
    """One projection and all uses of its product."""

    head: Projection
    terminals: list[tuple[Node, Terminal]] = field(default_factory=list)
    outputs: list[Node] = field(default_factory=list)  # followed nodes that the graph returns
    escapes: list[Refusal] = field(default_factory=list)  # uses that no rule reads, each at its node
    followed: list[Node] = field(default_factory=list)  # nodes whose value is followed, in order
    sizes: list[tuple[Node, Any]] = field(default_factory=list)  # numbers of rows, each with a tensor of that length
    overwritten: list[Node] = field(default_factory=list)  # nodes whose value was changed in place later


UNREMARKABLE_OPS = frozenset(
    {"to", "mul", "add", "sub", "div", "sum", "neg", "reshape", "unsqueeze", "detach", "getitem", "squeeze"}
)  # too common to be named in a report


@dataclass(eq=False)
class Region:
    """The token values of heads that meet, and the results that the graph reads."""

    heads: set[Projection]
    inside: list[Node] = field(default_factory=list)  # nodes that the call replaces
    results: list[tuple[Node, Any]] = field(default_factory=list)  # nodes to be given a value: TokenValue or Plain

    @property
    def outputs(self) -> list[TokenValue]:
        """The values that leave the token program, each once."""
        values = {id(p.expr): p for _, value in self.results for p in token_values_of(value)}
        return list(values.values())

    @property
    def gathers(self) -> bool:
        """Whether the program gathers entries along the vocabulary."""
        return any("gather" in ops_of(out.expr) for out in self.outputs)

    @property
    def computes(self) -> str:
        """The ops of the program in a few words, for the report."""
        names = dict.fromkeys(name for out in self.outputs for name in ops_of(out.expr))
        shown = [n for n in names if n not in UNREMARKABLE_OPS]
        return f"rowwise({', '.join(shown[:4])}{', ...' if len(shown) > 4 else ''})"


def ops_of(expr: Any) -> list[str]:
    """The names of the ops of an expression, sorted."""
    packets = {getattr(x.op, "_overloadpacket", x.op) for x in walk(expr) if isinstance(x, Expr)}
    return sorted({getattr(packet, "__name__", str(packet)).strip("_") for packet in packets})


@dataclass(eq=False)
class Reading:
    """The result of an interpretation of a graph."""

    sites: list[Site]
    values: dict[Node, Any]
    tokenwise: dict[Node, Any] = field(default_factory=dict)  # what no statistic gives, computed token by token
    no_rule: dict[Node, Refusal] = field(default_factory=dict)  # products in which no rule sees a head, and why
    regions: list[Region] | None = None  # what `token_regions.regions` says of it, once it was asked


class Decision(NamedTuple):
    """Whether a site is fused, and why not."""

    site: Site
    reason: Refusal | None  # why it stays as it is; None where it is fused
    deferred_only: bool = False  # whether it has no loss in the graph: its logits are returned and deferred


def head_nodes(site: Site) -> set[Node]:
    """The nodes of a site's projection, of everything followed from it, and of its weight."""
    return {site.head.node, *site.followed, *making(weights_of(site))}


def weights_of(site: Site) -> list[Node]:
    """The nodes of a head's weight: the weight and the nodes that it is a view of."""
    return nodes_of([site.head.weight])


def weight_can_be_remade(site: Site) -> bool:
    """Whether the weight can be recomputed from the graph's inputs outside of the graph."""
    return all(made_of_inputs(weight) is not None for weight in weights_of(site))


def tokens_of(site: Site) -> Any:
    """The number of tokens of a head, N: an int or a symbol."""
    value = fake(site.head.node) if isinstance(site.head, StackedProjection) else site.head.hidden.val
    shape = value.shape[:-1] if value.ndim else ()
    if site.terminals:
        logits = site.terminals[0][1].logits
        shape = [s for d, s in enumerate(logits.val.shape) if d != logits.class_dim]
    return math.prod(shape)
