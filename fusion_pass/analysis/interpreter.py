"""The abstract interpreter: walks a Dynamo graph and says what each tensor is relative to the logits of a head.

The result is a list of `Site`s, one for each projection that a loss may depend on: its terminals (one number a row
remains), its outputs (logits leave the graph), and its escapes (uses that no rule reads, each with a sentence).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.fx import Node

from fusedhead.analysis.evaluator import all_followed, is_value, trace_value
from fusedhead.analysis.reasons import Untraced
from fusedhead.analysis.site import Reading, Site
from fusedhead.compat import tree_leaves, tree_map
from fusedhead.graph.aliases import storage
from fusedhead.graph.effects import effects
from fusedhead.graph.facts import GraphFacts, before
from fusedhead.graph.nodes import fake, name_of
from fusedhead.graph.reasons import Escape, Refusal, refuse
from fusedhead.graph.tracing import Traces
from fusedhead.ir.expr import Expr, Plain
from fusedhead.ir.logits import LOGITS_LIKE, Logits, Projection, detached, logits_of, rows_of_hidden
from fusedhead.ir.terminal import Terminal
from fusedhead.ir.tokenwise import MaskedRows, TokenValue, token_values_of, without_gradient
from fusedhead.rules.tokenwise.dispatch import token_value

EMPTY: Mapping[Node, Logits] = {}


def interpret(
    facts: GraphFacts,
    traces: Traces,
    starts: Collection[Node],
    stacks: Mapping[Node, Logits] = EMPTY,
    tokenwise_only: Collection[Node] = (),
) -> Reading:
    """Follow the logits of the projections in ``starts`` through the graph of ``facts``.

    ``stacks``: nodes that are the logits of several heads at once. ``tokenwise_only``: projections whose logits are
    read token by token from the start, whatever statistics there are.
    """
    starts, grad_mode = set(starts), facts.grad_mode
    values: dict[Node, Any] = {}
    sites: dict[Projection, Site] = {}
    tokenwise: dict[Node, Any] = {}
    no_rule: dict[Node, Refusal] = {}
    sharing: dict[int | None, list[Node]] = {}
    for node in facts.graph.nodes:
        sources = [values[s] for s in node.all_input_nodes if s in values]
        heads = heads_of(sources) if sources else set()
        if node.op == "output":
            for source in node.all_input_nodes:
                note_returned(source, values.get(source), sites)
            continue
        if node in stacks:
            values[node] = stacks[node] if grad_mode(node) else detached(stacks[node])
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
            value = trace_value(node, values, traces)
        except Escape as escape:
            if not heads:
                no_rule[node] = escape.at(node)
            if not all(isinstance(s, TokenValue) and s.small for s in sources):
                for head in heads:
                    sites[head].escapes.append(escape.at(node))
            continue
        if not grad_mode(node):
            value = tree_map(without_gradient, value, is_leaf=is_value)
        if node in tokenwise_only and isinstance(value, Logits):
            sites[value.head] = Site(value.head, followed=[node])
            value = token_value(value)
        if any(True for _ in token_values_of(value)):
            tokenwise[node] = value
        else:
            note_value(node, value, heads, sites)
        if not isinstance(value, (Terminal, Plain)):
            values[node] = value
            sharing.setdefault(storage(fake(node)), []).append(node)
            note_overwritten(node, target, Overwriting(values, sharing, sites, grad_mode(node)))
    return Reading(list(sites.values()), values, tokenwise, no_rule)


def note_returned(source: Node, value: Any, sites: dict[Projection, Site]) -> None:
    """Note the followed values that the graph returns: logits become outputs of their site."""
    for followed in all_followed(value):
        sites[logits_of(followed).head].outputs.append(source)
    for part in token_values_of(value):
        if not part.small:
            for head in part.heads:
                sites[head].escapes.append(refuse(Untraced.RETURNED_WIDE, node=source, name=source.name))


def counts_rows(node: Node, values: dict[Node, Any]) -> bool:
    """Whether a node is the length of a row dimension of followed logits, which is data-dependent after a mask."""
    value = values.get(node.args[0]) if node.args else None  # type: ignore[arg-type]
    if node.target is not torch.ops.aten.sym_size.int:
        return False
    if isinstance(value, MaskedRows):
        return bool(node.args[1] == 0)
    if not isinstance(value, LOGITS_LIKE):
        return False
    return int(node.args[1]) % value.val.ndim != logits_of(value).class_dim  # type: ignore[arg-type]


def written_logits(node: Node, values: Mapping[Node, Any]) -> Node | None:
    """The followed logits that a node writes to; None where it writes to none. Raises Escape."""
    does = effects(node)
    if not does.sure and values.keys().isdisjoint(node.all_input_nodes):
        return None  # a projection that a dry run cannot run: its operands are checked later
    if not does.sure or does.anything or does.backward:
        raise Escape(Untraced.UNKNOWN_EFFECTS, name=name_of(node))
    if len(does.written) > 1 or any(target not in values for target in does.written):
        raise Escape(Untraced.WRITES_OTHER_MEMORY, name=name_of(node))
    return next(iter(does.written), None)


class Overwriting(NamedTuple):
    """The state of the walk where a node writes to followed logits."""

    values: dict[Node, Any]
    sharing: Mapping[int | None, Sequence[Node]]  # the nodes that have a value, by their memory
    sites: dict[Projection, Site]
    grad: bool  # whether gradients are recorded there


def note_overwritten(node: Node, target: Node | None, overwriting: Overwriting) -> None:
    """An in-place step on followed logits: from here on the name that was written to has the new value.

    Exact as long as no other live name shares the memory; otherwise the site escapes.
    """
    values, sites = overwriting.values, overwriting.sites
    if target is None or not isinstance(values[node], (TokenValue, *LOGITS_LIKE)):
        return

    def escape(refusal: Refusal) -> None:
        for head in heads_of([values[node]]):
            sites[head].escapes.append(refusal)

    if not overwriting.grad and fake(target).requires_grad:
        escape(refuse(Untraced.NO_GRADIENT_RECORDED, node=node, name=name_of(node)))
    for other in overwriting.sharing.get(storage(fake(target)), ()):
        if other in (node, target) or not heads_of([values[other]]):
            continue
        if any(before(node, user) for user in other.users):
            escape(refuse(Untraced.HAS_A_VIEW, node=node, name=name_of(node), other=other.name))
    values[target] = values[node]
    for head in heads_of([values[node]]):
        sites[head].overwritten.append(target)


def heads_of(values: Any) -> set[Projection]:
    """The heads that values belong to, or that results are computed from."""
    leaves = [v.logits if isinstance(v, Terminal) else v for v in tree_leaves(values, is_leaf=is_value)]
    heads = {head for v in leaves for part in token_values_of(v) for head in part.heads}
    return heads.union(logits_of(v).head for v in leaves if isinstance(v, LOGITS_LIKE))


def note_value(node: Node, value: Any, heads: Iterable[Projection], sites: dict[Projection, Site]) -> None:
    """Record the value of a node at the sites of its heads."""
    if isinstance(value, Terminal):
        sites[value.logits.head].terminals.append((node, value))
        for head in set(heads) - {value.logits.head}:
            sites[head].escapes.append(refuse(Untraced.TWO_HEADS, node=node, computes=value.computes))
        return
    followed = all_followed(value)
    ends = [v for v in tree_leaves(value, is_leaf=is_value) if isinstance(v, Terminal)]
    for head in {end.logits.head for end in ends}:
        sites[head].followed.append(node)  # a tuple of results: its getitems are the terminals
    if not followed and not ends:
        for head in heads:
            sites[head].escapes.append(refuse(Untraced.NOT_FOLLOWED, node=node, name=name_of(node)))
    for each in followed:
        head = logits_of(each).head
        sites.setdefault(head, Site(head)).followed.append(node)
