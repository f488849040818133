"""The abstract interpreter: walks a Dynamo graph and says what each tensor is, relative to the logits of a head.

The result is a list of `Site`s, one per projection that a loss could hang on: its terminals (where one number a
row remains), its outputs (where logits leave the graph), and its escapes (uses no rule can read, each with a
sentence). This file reads; it never edits and never decides.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, Node

from fusedhead.analysis.evaluator import all_followed, is_value, trace_value
from fusedhead.analysis.projections import candidates
from fusedhead.analysis.reasons import Untraced
from fusedhead.compat import tree_leaves, tree_map
from fusedhead.graph.aliases import storage
from fusedhead.graph.effects import effects
from fusedhead.graph.facts import before
from fusedhead.graph.modes import grad_modes
from fusedhead.graph.nodes import Traces, fake, name_of
from fusedhead.graph.run_counts import Run
from fusedhead.ir.expr import Expr, Plain
from fusedhead.ir.logits import LOGITS_LIKE, Logits, Projection, detached, logits_of, rows_of_hidden
from fusedhead.ir.reasons import Escape
from fusedhead.ir.terminal import Terminal
from fusedhead.ir.tokenwise import MaskedRows, TokenValue, token_values_of, without_gradient
from fusedhead.rules.tokenwise.dispatch import token_value

EMPTY: Mapping[Node, Logits] = {}
RUN = "fusedhead_run"
LEAVES = (
    "{}, computed from all logits, is returned: it is as wide as they are, and the graph ends before it is reduced "
    "over the classes (where a boolean mask ends the graph, a product with the mask does not, nor does a sum of what "
    "the mask picks under torch._dynamo.config.capture_dynamic_output_shape_ops)"
)


@dataclass(eq=False)
class Site:
    """One projection and everything the graph does with its product."""

    head: Projection
    terminals: list[tuple[Node, Terminal]] = field(default_factory=list)
    outputs: list[Node] = field(default_factory=list)  # followed nodes that the graph returns
    escapes: list[tuple[Node, str]] = field(default_factory=list)
    followed: list[Node] = field(default_factory=list)  # nodes whose value is followed, in order
    sizes: list[tuple[Node, Any]] = field(default_factory=list)  # nodes that are numbers of rows, and what is as long
    overwritten: list[Node] = field(default_factory=list)  # nodes whose value was changed in place later

    @property
    def run(self) -> Run:
        """What becomes of the logits when the graph is run; kept with the product, which may be read several times."""
        return run_of(self.head.node)


def run_of(product: Node) -> Run:
    return product.meta.setdefault(RUN, Run())  # type: ignore[no-any-return]


@dataclass(eq=False)
class Reading:
    sites: list[Site]
    values: dict[Node, Any]
    rowwise: dict[Node, Any] = field(default_factory=dict)  # what no statistic gives, computed token by token
    unread: dict[Node, str] = field(default_factory=dict)  # products in which no rule sees a head, and why


def interpret(
    graph: Graph,
    starts: Iterable[Node] | None = None,
    grad: bool | None = None,
    stacks: Mapping[Node, Logits] = EMPTY,
    by_rows: Collection[Node] = (),
) -> Reading:
    """Follow the logits of every candidate projection, or of those in ``starts``, through the graph.

    ``stacks``: nodes that are the logits of several heads at once. ``by_rows``: projections whose logits are read
    token by token from the start, whatever statistics there are.
    """
    starts, modes = candidates(graph) if starts is None else set(starts), grad_modes(graph, grad)
    values: dict[Node, Any] = {}
    sites: dict[Projection, Site] = {}
    rowwise: dict[Node, Any] = {}
    unread: dict[Node, str] = {}
    sharing: dict[int | None, list[Node]] = {}
    traced = Traces()
    for node in graph.nodes:
        sources = [values[s] for s in node.all_input_nodes if s in values]
        heads = heads_of(sources)
        if node.op == "output":
            for source in node.all_input_nodes:
                returned(source, values.get(source), sites)
            continue
        if node in stacks:
            values[node] = stacks[node] if modes[node] else detached(stacks[node])
            sharing.setdefault(storage(fake(node)), []).append(node)
            sites[stacks[node].head] = Site(stacks[node].head, followed=[*stacks[node].head.products, node])
            continue
        if not heads and node not in starts:
            continue
        if counts_rows(node, values):
            counted = values[node.args[0]]  # type: ignore[index]
            if isinstance(counted, MaskedRows):
                first = next(head for head in sites if head in counted.heads)
                sites[first].sizes.append((node, Expr(torch.ops.aten.nonzero.default, (counted.mask,))))
            else:
                logits = logits_of(counted)
                sites[logits.head].sizes.append((node, rows_of_hidden(logits)))
            continue
        try:
            target = written_logits(node, values)
            value = trace_value(node, values, traced)
        except Escape as escape:
            if not heads:
                unread[node] = str(escape)
            if not all(isinstance(s, TokenValue) and s.small for s in sources):
                for head in heads:
                    sites[head].escapes.append((node, str(escape)))
            continue
        if not modes[node]:
            value = tree_map(without_gradient, value, is_leaf=is_value)
        if node in by_rows and isinstance(value, Logits):
            sites[value.head] = Site(value.head, followed=[node])
            value = token_value(value)
        if any(True for _ in token_values_of(value)):
            rowwise[node] = value
        else:
            record(node, value, heads, sites)
        if not isinstance(value, (Terminal, Plain)):
            values[node] = value
            sharing.setdefault(storage(fake(node)), []).append(node)
            overwritten(node, target, values, sharing, sites, modes[node])
    return Reading(list(sites.values()), values, rowwise, unread)


def returned(source: Node, value: Any, sites: dict[Projection, Site]) -> None:
    """File what the graph returns: logits leave it, small results of theirs do anyway."""
    for followed in all_followed(value):
        sites[logits_of(followed).head].outputs.append(source)
    for part in token_values_of(value):
        if not part.small:
            for head in part.heads:
                sites[head].escapes.append((source, LEAVES.format(source.name)))


def counts_rows(node: Node, values: dict[Node, Any]) -> bool:
    """Whether a node is the length of a row dimension of followed logits, which after a mask only the data know."""
    value = values.get(node.args[0]) if node.args else None  # type: ignore[arg-type]
    if node.target is not torch.ops.aten.sym_size.int:
        return False
    if isinstance(value, MaskedRows):
        return bool(node.args[1] == 0)
    if not isinstance(value, LOGITS_LIKE):
        return False
    return int(node.args[1]) % value.val.ndim != logits_of(value).class_dim  # type: ignore[arg-type]


def written_logits(node: Node, values: Mapping[Node, Any]) -> Node | None:
    """The name of followed logits that a node writes to; None where it writes to nothing. Raises Escape."""
    does = effects(node)
    if not does.sure and values.keys().isdisjoint(node.all_input_nodes):
        return None  # a projection of what cannot be run: whether its operands are plain tensors is asked later
    if not does.sure or does.anything or does.backward:
        raise Escape(Untraced.UNKNOWN_EFFECTS, name=name_of(node))
    if len(does.written) > 1 or any(target not in values for target in does.written):
        raise Escape(Untraced.WRITES_OTHER_MEMORY, name=name_of(node))
    return next(iter(does.written), None)


def overwritten(
    node: Node,
    target: Node | None,
    values: dict[Node, Any],
    sharing: Mapping[int | None, Sequence[Node]],
    sites: dict[Projection, Site],
    grad: bool,
) -> None:
    """After an in-place step on followed logits: the name that was written to means the new value from here on.

    Pure as long as no other live name shares the memory; otherwise the site escapes. ``sharing``: the nodes that have
    a value, by their memory.
    """
    if target is None or not isinstance(values[node], (TokenValue, *LOGITS_LIKE)):
        return

    def escape(reason: str) -> None:
        for head in heads_of([values[node]]):
            sites[head].escapes.append((node, reason))

    if not grad and fake(target).requires_grad:
        escape(f"{name_of(node)} changes the logits in place where no gradient is recorded")
    for other in sharing.get(storage(fake(target)), ()):
        if other in (node, target) or not heads_of([values[other]]):
            continue
        if any(before(node, user) for user in other.users):
            escape(f"{name_of(node)} changes logits that {other.name} is a view of")
    values[target] = values[node]
    for head in heads_of([values[node]]):
        sites[head].overwritten.append(target)


def heads_of(values: Any) -> set[Projection]:
    """The heads that values, or results that hang on them, belong to."""
    found = [v.logits if isinstance(v, Terminal) else v for v in tree_leaves(values, is_leaf=is_value)]
    met = {head for v in found for part in token_values_of(v) for head in part.heads}
    return met.union(logits_of(v).head for v in found if isinstance(v, LOGITS_LIKE))


def record(node: Node, value: Any, heads: Iterable[Projection], sites: dict[Projection, Site]) -> None:
    """File what was learnt about a node under the heads it belongs to."""
    if isinstance(value, Terminal):
        sites[value.logits.head].terminals.append((node, value))
        for head in set(heads) - {value.logits.head}:
            sites[head].escapes.append((node, f"{value.computes} mixes two heads"))
        return
    found = all_followed(value)
    ends = [v for v in tree_leaves(value, is_leaf=is_value) if isinstance(v, Terminal)]
    for head in {end.logits.head for end in ends}:
        sites[head].followed.append(node)  # a tuple of results: its getitems are the terminals
    if not found and not ends:
        for head in heads:
            sites[head].escapes.append((node, f"{name_of(node)} of the logits is not followed"))
    for each in found:
        head = logits_of(each).head
        sites.setdefault(head, Site(head)).followed.append(node)
