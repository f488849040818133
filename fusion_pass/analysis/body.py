"""A `Body`: one graph of a module, how it is run, and the state of the passes over it.

A pass is a function ``run(body)``. It reads and writes fields of the body, and edits its graph.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from fusedhead.analysis.cost import Price, price_outside
from fusedhead.analysis.reasons import NotInForward
from fusedhead.analysis.site import Decision, Reading, Region, Site
from fusedhead.analysis.source_lines import place
from fusedhead.graph.dtensors import KEPT_SHARDS
from fusedhead.graph.facts import GraphFacts
from fusedhead.graph.nodes import fake, name_of
from fusedhead.graph.op_names import CHECKPOINTS
from fusedhead.graph.reasons import Refusal, refuse
from fusedhead.graph.recipes import Recipe, Wrap, nested, redirect
from fusedhead.graph.run_counts import Run
from fusedhead.graph.tracing import Traces
from fusedhead.ir.logits import Projection, StackedProjection
from fusedhead.options import Options

NONE_EXCLUDED: Mapping[str, Refusal] = {}


class Finding(NamedTuple):
    """A product that the report lists although the pass does not rewrite it."""

    node: Node  # the product, or the call of a region that holds it
    reason: Refusal | None  # why it stays; None where its logits are returned and deferred
    where: str  # its line in the program
    likely: bool = True  # whether it is taken for a head


@dataclass(eq=False)
class ReturnedStack:
    """Stacked heads whose logits the graph only returns."""

    head: StackedProjection
    arranged: list[Node]  # the stack, and the nodes between it and the outputs, in order
    outputs: list[Node]


@dataclass(eq=False)
class Emitted:
    """The op calls that take the place of some heads, and what they cost."""

    calls: list[Node]
    heads: list[Projection]
    token_by_token: bool
    prices: list[Price] = field(default_factory=list)


@dataclass(eq=False)
class Body:
    """One graph and the state of the passes over it."""

    graph: Graph
    options: Options
    owner: str = ""  # the name of the higher-order op that runs it, "" for the graph itself
    grad: bool | None = None  # whether gradients are recorded where it is run; None for both
    calls: tuple[Node, ...] = ()  # the nodes that run it
    defers: bool = False  # whether logits that it returns may be handed out deferred
    traces: Traces = field(default_factory=Traces)
    reports_products: bool = True  # whether the report speaks of products that are no heads
    excluded: Mapping[str, Refusal] = field(
        default_factory=lambda: NONE_EXCLUDED
    )  # products to be left, by name, and why

    # what the passes find and decide, in this order
    speculated: list[Node] = field(default_factory=list)  # products that a speculative pass made or moved
    returned_stacks: list[ReturnedStack] = field(default_factory=list)
    returned_heads: list[Decision] = field(default_factory=list)  # on each head of such stacks, for the report
    starts: set[Node] = field(default_factory=set)  # projections whose logits are followed
    returned: set[Node] = field(default_factory=set)  # projections without a loss whose logits are returned
    reading: Reading = field(default_factory=lambda: Reading([], {}))
    findings: list[Finding] = field(default_factory=list)
    regions: dict[Projection, Region] = field(default_factory=dict)  # the token programs that heads meet in
    decisions: list[Decision] = field(default_factory=list)
    least: dict[Projection, int] = field(default_factory=dict)  # calls with fewer logits build them; 0: no call does
    lines: dict[Projection, str] = field(default_factory=dict)  # of the heads that are decided on
    emitted: list[Emitted] = field(default_factory=list)
    grown: dict[str, Refusal] = field(default_factory=dict)  # fused products that would hold more than their logits
    wrap: Wrap | None = None  # what goes around the compiled graph
    runs: defaultdict[Node, Run] = field(default_factory=lambda: defaultdict(Run))  # what becomes of a product's logits
    edits: int = 0  # nodes made, erased and changed so far

    def __post_init__(self) -> None:
        self.facts = GraphFacts(self.graph, self.records_gradients, self.calls)

    @property
    def module(self) -> GraphModule:
        module = self.graph.owning_module
        assert module is not None
        return module

    @property
    def is_top(self) -> bool:
        """Whether it is the graph that was given to the backend, and not one that a node runs."""
        return self.owner == ""

    @property
    def records_gradients(self) -> bool:
        """Whether gradients are recorded where the graph begins. Assumed of a graph that is run in both modes."""
        return self.grad is not False

    @property
    def recomputes(self) -> Refusal | None:
        """Why no gradient may be computed in the graph's forward; None where one may."""
        if self.owner in CHECKPOINTS:
            return refuse(NotInForward.CHECKPOINTED)
        return refuse(NotInForward.BOTH_MODES) if self.grad is None else None

    def edited(self, *nodes: Node) -> None:
        """Count an edit that neither makes nor erases a node."""
        self.edits += len(nodes)

    def redirect(self, recipes: Sequence[Recipe]) -> None:
        """Let the graph return the recipes' sources. The recipes run around the compiled graph and make the outputs."""
        if recipes:
            self.wrap = nested(self.wrap, redirect(self.graph, recipes))
            self.edited(self.graph.output_node())

    def fused(self) -> list[Decision]:
        """The decisions to fuse."""
        return [decision for decision in self.decisions if not decision.reason]

    def prices_of(self, site: Site) -> list[Price]:
        """The prices of a fused head: of its token programs and sweeps, or of the loss that the caller takes."""
        prices = [price for emitted in self.emitted if site.head in emitted.heads for price in emitted.prices]
        return prices or [price_outside(site, self.options.budget)]

    def note(self, product: Node, reason: Refusal | None, likely: bool = True) -> None:
        """List a product of tensors in the report."""
        values = [fake(product), next((fake(operand) for operand in product.all_input_nodes), None)]
        if all(isinstance(value, Tensor) and value.ndim for value in values):
            self.findings.append(Finding(product, product.meta.get(KEPT_SHARDS, reason), place(product), likely))


class GraphUse(NamedTuple):
    """A graph of a module and how it is run; the fields are those of `Body`."""

    module: GraphModule
    owner: str
    grad: bool | None
    calls: tuple[Node, ...]


def graph_uses(gm: GraphModule) -> list[GraphUse]:
    """The graph of a module and the graphs that its nodes run, each once."""
    uses: dict[GraphModule, GraphUse] = {}

    def visit(module: GraphModule, owner: str, grad: bool | None, call: Node | None) -> None:
        use = uses.get(module)
        calls = (*(use.calls if use else ()), *([call] if call is not None else ()))
        if use is not None and use.grad == grad:
            uses[module] = use._replace(calls=calls)
            return
        uses[module] = GraphUse(module, owner, grad if use is None else None, calls)
        facts = GraphFacts(module.graph, grad is not False)
        for node in module.graph.find_nodes(op="get_attr"):
            part = getattr(module, str(node.target), None)
            if isinstance(part, GraphModule):
                for user in node.users:
                    visit(part, name_of(user), facts.grad_mode(user) if grad is not None else None, user)

    visit(gm, "", torch.is_grad_enabled(), None)
    return list(uses.values())
