"""Sweeps: which terminals one pass over the vocabulary serves.

The terminals of a `SweepGroup` read the same rows through the same transform. The groups of a `Batch` differ only in
their rows: a loop over rows, or over pieces of the tokens, becomes one sweep and one gradient of the weight. Nodes that
a batch needs early are moved before it where that changes nothing; no other node is edited.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.fx import Node

from fusedhead.analysis.site import Site
from fusedhead.graph.facts import GraphFacts
from fusedhead.graph.motion import hoist_before
from fusedhead.graph.nodes import name_of
from fusedhead.ir.expr import Plain, nodes_of, structure_key
from fusedhead.ir.logits import Logits, StackedProjection, row_identity, sources_of
from fusedhead.ir.terminal import Kind, Labels, Terminal
from fusedhead.kernels.contract import DECISIONS, STATS
from fusedhead.kernels.transform.transform import Transform

MOST_HOISTED = 24  # nodes moved for one group


@dataclass(eq=False)
class SweepGroup:
    """Terminals that one sweep over the vocabulary serves, with the weights of its sum and its rounding."""

    terminals: list[tuple[Node, Terminal]]
    weightings: set[int] = field(default_factory=set)
    roundings: set[tuple] = field(default_factory=set)

    @property
    def first(self) -> Terminal:
        return self.terminals[0][1]

    @property
    def logits(self) -> Logits:
        return self.first.logits

    @property
    def labels(self) -> list[Labels]:
        """Emitters of the terminals' distinct labels, in order."""
        return list({t.label_key: t.labels for _, t in self.terminals if t.labels is not None}.values())

    @property
    def weights(self) -> Plain | None:
        """The weights of the sum over classes, [V]."""
        return next((t.weights for _, t in self.terminals if t.weights is not None), None)

    @property
    def picks(self) -> list[tuple[Any, int]]:
        """The distinct labels of the terminals, in order: (key, labels a row)."""
        return list({t.label_key: t.label_count for _, t in self.terminals if t.labels is not None}.items())

    def anchor(self, position: dict[Node, int]) -> Node:
        """The first terminal, before which the sweep must run."""
        return min((node for node, _ in self.terminals), key=position.__getitem__)

    @property
    def want(self) -> list[str]:
        wanted = {"lse"}.union(*(t.want for _, t in self.terminals))
        return [name for name in STATS if name in wanted]


def sweep_key(logits: Logits) -> tuple:
    """Logits with equal keys are the same [N, V] numbers in the same order of rows."""
    return *row_identity(logits), Transform(logits.steps).smooth, logits.detached


def weightings_of(terminals: Sequence[tuple[Node, Terminal]]) -> set[int]:
    """The distinct weights of the statistic `sum` among terminals that read it."""
    return {id(t.weights) if t.weights is not None else 0 for _, t in terminals if "sum" in t.want}


def roundings_of(terminals: Sequence[tuple[Node, Terminal]]) -> set[tuple]:
    """The distinct chains, with their rounding, on which max and argmax are computed."""
    return {t.logits.steps for _, t in terminals if DECISIONS & t.want}


def groups(site: Site, replaced: set[Node], facts: GraphFacts) -> list[SweepGroup]:
    """Partition a site's terminals into sweeps.

    Two terminals share a sweep if their keys are equal, their labels exist or can be computed before the first use of
    either, their weights of the sum over classes are equal, and no gradient is wanted of a sweep that starts under
    no_grad.
    """
    position = facts.position
    by_key: dict[tuple, list[SweepGroup]] = {}
    for node, terminal in site.terminals:
        is_ready = all(position[leaf] < position[node] for leaf in nodes_of(terminal.label_sources))
        assert is_ready, "a node follows its inputs"
        candidates = by_key.setdefault(sweep_key(terminal.logits), [])
        weights, roundings = weightings_of([(node, terminal)]), roundings_of([(node, terminal)])
        for group in candidates:
            first = group.terminals[0][0]  # terminals are in the graph's order
            if facts.grad_mode(node) and not facts.grad_mode(first):
                continue
            by_weights, by_roundings = group.weightings | weights, group.roundings | roundings
            read = nodes_of((*terminal.label_sources, terminal.weights))
            if (
                len(by_weights) <= 1
                and len(by_roundings) <= 1
                and (
                    all(position[x] < position[first] for x in read) or made_before(first, node, read, replaced, facts)
                )
            ):
                group.terminals.append((node, terminal))
                group.weightings, group.roundings = by_weights, by_roundings
                break
        else:
            candidates.append(SweepGroup([(node, terminal)], weights, roundings))
    return [group for each in by_key.values() for group in each]


Batch = list[SweepGroup]


def key_apart_from_rows(group: SweepGroup, facts: GraphFacts) -> tuple:
    """A key that is equal for groups that differ only in their rows."""
    logits, head = group.logits, group.logits.head
    if isinstance(head, StackedProjection):
        return (id(group),)
    hidden, weight = head.hidden.val, head.weight.val
    return (
        (structure_key(head.weight), head.dtype, logits.vocab, weight.requires_grad),
        (hidden.requires_grad, hidden.dtype, hidden.device),
        (Transform(logits.steps).smooth, frozenset(roundings_of(group.terminals)), logits.detached),
        (tuple(map(structure_key, logits.cols)), tuple(row.value.val.requires_grad for row in logits.rows)),
        (tuple(group.want), tuple(count for _, count in group.picks), facts.grad_mode(group.terminals[0][0])),
        tuple(structure_key(t.weights) for _, t in group.terminals if "sum" in t.want)[:1],
    )


def is_squared(node: Node) -> bool:
    """Whether lse is squared (z-loss). Such terminals are not batched: the gradient of lse² needs the whole lse."""
    names = {name_of(user) for user in node.users}
    return bool(names & {"pow", "__pow__", "square"}) or any(
        name_of(user) in ("mul", "multiply") and user.args[:1] == user.args[1:2] for user in node.users
    )


def sweep_operands(group: SweepGroup) -> list[Node]:
    """The graph's nodes that a group's sweep reads."""
    labels = [source for _, t in group.terminals for source in t.label_sources]
    return sources_of(group.logits) + nodes_of(labels)


def batches(sites: Collection[Site], facts: GraphFacts) -> list[Batch]:
    """The sweeps of these sites, in order."""
    position = facts.position
    replaced = {node for site in sites for node in (site.head.node, *site.followed, *(n for n, _ in site.terminals))}
    ordered = [group for site in sites for group in groups(site, replaced, facts)]
    ordered.sort(key=lambda group: position[group.anchor(position)])
    joined: dict[tuple, list[Batch]] = {}
    result: list[Batch] = []
    for group in ordered:
        open_batches = joined.setdefault(key_apart_from_rows(group, facts), [])
        z_loss = any(t.kind is Kind.LSE and is_squared(node) for node, t in group.terminals)
        if not z_loss and open_batches and moved_up(group, open_batches[-1], replaced, facts):
            open_batches[-1].append(group)
            continue
        batch = [group]
        result.append(batch)
        if not z_loss:
            open_batches.append(batch)
    return result


def moved_up(group: SweepGroup, batch: Batch, replaced: set[Node], facts: GraphFacts) -> bool:
    """Move the operands of a group before the first sweep of a batch; returns whether they are there now."""
    anchor, reader = batch[0].anchor(facts.position), group.anchor(facts.position)
    return made_before(anchor, reader, sweep_operands(group), replaced, facts)


def made_before(anchor: Node, reader: Node, read: Sequence[Node], replaced: set[Node], facts: GraphFacts) -> bool:
    """Move the operands of ``reader`` before ``anchor``; returns whether they are there now."""
    if facts.write_between(anchor, reader, read) is not None:
        return False
    return hoist_before(read, anchor, replaced, facts, MOST_HOISTED)
