"""Which terminals one sweep over the vocabulary serves.

A `Group` is terminals that read the same rows through the same transform. A `Batch` is groups that differ in their
rows alone: a loop over rows, or over pieces of the tokens, is one sweep over all of them, and one gradient of the
weight. Nothing here edits a node; what a batch needs early is moved before it, where that changes nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.fx import Node

from fusedhead.analysis.interpreter import Site
from fusedhead.compat import tree_flatten
from fusedhead.graph.motion import brought
from fusedhead.graph.nodes import name_of
from fusedhead.ir.logits import Call, Plain, Stack, leaves, sources_of, sweep
from fusedhead.ir.terminal import Terminal
from fusedhead.kernels.contract import DECISIONS, STATS
from fusedhead.kernels.transform.transform import Transform
from fusedhead.legality.checks import Mutations

MOST_MOVED = 24  # nodes that are moved for the sake of one group


@dataclass(eq=False)
class Group:
    """Terminals that one sweep over the vocabulary serves, what they weigh its sum by, what they round it to."""

    terminals: list[tuple[Node, Terminal]]
    weights: set[int] = field(default_factory=set)
    roundings: set[tuple] = field(default_factory=set)

    @property
    def first(self) -> Terminal:
        return self.terminals[0][1]

    @property
    def picks(self) -> list[tuple[Any, int]]:
        """The distinct labels of the terminals, in order: a key and how many a row."""
        return list({t.label_key: t.label_count for _, t in self.terminals if t.labels is not None}.items())

    def anchor(self, position: dict[Node, int]) -> Node:
        """The first terminal, before which the sweep must run."""
        return min((node for node, _ in self.terminals), key=position.__getitem__)

    @property
    def want(self) -> list[str]:
        asked = {"lse"}.union(*(t.want for _, t in self.terminals))
        return [name for name in STATS if name in asked]


def sweep_key(terminal: Terminal) -> tuple:
    """Terminals with equal keys see the same [N, V] logits in the same order of rows."""
    logits = terminal.logits
    return *sweep(logits), Transform(logits.steps).smooth, logits.detached


def weights_of(terminals: Sequence[tuple[Node, Terminal]]) -> set[int]:
    """The distinct weightings of the statistic `sum` among terminals that ask for it."""
    return {id(t.weights) if t.weights is not None else 0 for _, t in terminals if "sum" in t.want}


def roundings_of(terminals: Sequence[tuple[Node, Terminal]]) -> set[tuple]:
    """The distinct chains, with their rounding, that decisions (max, argmax) are taken on."""
    return {t.logits.steps for _, t in terminals if DECISIONS & t.want}


def groups(site: Site, grad: dict[Node, bool], replaced: set[Node], mutations: Mutations) -> list[Group]:
    """Partition a site's terminals into sweeps.

    Two terminals share one if their keys agree, their labels exist before the first of them is used or can be made
    there, they do not weigh the sum over classes differently, and no gradient is wanted of a sweep that starts under
    no_grad.
    """
    position = mutations.position
    found: dict[tuple, list[Group]] = {}
    for node, terminal in site.terminals:
        ready = all(position[leaf] < position[node] for leaf in leaves(terminal.label_sources))
        assert ready, "a node follows its inputs"
        known = found.setdefault(sweep_key(terminal), [])
        weights, roundings = weights_of([(node, terminal)]), roundings_of([(node, terminal)])
        for group in known:
            first = group.terminals[0][0]  # terminals come in the order of the graph
            if grad[node] and not grad[first]:
                continue
            by_weights, by_roundings = group.weights | weights, group.roundings | roundings
            read = leaves((*terminal.label_sources, terminal.weights))
            if (
                len(by_weights) <= 1
                and len(by_roundings) <= 1
                and (
                    all(position[x] < position[first] for x in read)
                    or made_before(first, node, read, replaced, mutations)
                )
            ):
                group.terminals.append((node, terminal))
                group.weights, group.roundings = by_weights, by_roundings
                break
        else:
            known.append(Group([(node, terminal)], weights, roundings))
    return [group for each in found.values() for group in each]


Batch = list[Group]


def key_of(ref: Any) -> Any:
    """A key that expressions of the same nodes and calls share."""
    if isinstance(ref, Plain):
        return key_of(ref.ref)
    if isinstance(ref, Call):
        flat, spec = tree_flatten((ref.args, ref.kwargs), is_leaf=lambda x: isinstance(x, (Plain, Call)))
        return ref.op, str(spec), tuple(map(key_of, flat))
    return ref if isinstance(ref, Node) else repr(ref)


def apart_from_rows(group: Group, grad: dict[Node, bool]) -> tuple:
    """Groups with equal keys differ in their rows alone."""
    logits, head = group.first.logits, group.first.logits.head
    if isinstance(head, Stack):
        return (id(group),)
    hidden, weight = head.hidden.val, head.weight.val
    return (
        (key_of(head.weight), head.dtype, logits.vocab, weight.requires_grad),
        (hidden.requires_grad, hidden.dtype, hidden.device),
        (Transform(logits.steps).smooth, frozenset(roundings_of(group.terminals)), logits.detached),
        (tuple(map(key_of, logits.cols)), tuple(row.value.val.requires_grad for row in logits.rows)),
        (tuple(group.want), tuple(count for _, count in group.picks), grad[group.terminals[0][0]]),
        tuple(key_of(t.weights) for _, t in group.terminals if "sum" in t.want)[:1],
    )


def squared(node: Node) -> bool:
    """Whether a result is squared: a z-loss, which is read off the whole lse."""
    names = {name_of(user) for user in node.users}
    return bool(names & {"pow", "__pow__", "square"}) or any(
        name_of(user) in ("mul", "multiply") and user.args[:1] == user.args[1:2] for user in node.users
    )


def operands_of(group: Group) -> list[Node]:
    """The graph's nodes that a group's sweep reads."""
    labels = [source for _, t in group.terminals for source in t.label_sources]
    return sources_of(group.first.logits) + leaves(labels)


def batches(sites: Collection[Site], grad: dict[Node, bool], mutations: Mutations) -> list[Batch]:
    """The sweeps of these sites, in order."""
    position = mutations.position
    replaced = {node for site in sites for node in (site.head.node, *site.followed, *(n for n, _ in site.terminals))}
    found = [group for site in sites for group in groups(site, grad, replaced, mutations)]
    found.sort(key=lambda group: position[group.anchor(position)])
    joined: dict[tuple, list[Batch]] = {}
    result: list[Batch] = []
    for group in found:
        known = joined.setdefault(apart_from_rows(group, grad), [])
        z_loss = any(t.computes == "logsumexp" and squared(node) for node, t in group.terminals)
        if not z_loss and known and moved_up(group, known[-1], replaced, mutations):
            known[-1].append(group)
            continue
        batch = [group]
        result.append(batch)
        if not z_loss:
            known.append(batch)
    return result


def moved_up(group: Group, batch: Batch, replaced: set[Node], mutations: Mutations) -> bool:
    """Whether what a group reads is, or now was made to be, there before the first sweep of a batch."""
    anchor, own = batch[0].anchor(mutations.position), group.anchor(mutations.position)
    return made_before(anchor, own, operands_of(group), replaced, mutations)


def made_before(anchor: Node, reader: Node, read: Sequence[Node], replaced: set[Node], mutations: Mutations) -> bool:
    """Whether what ``reader`` reads is, or now was made to be, there before ``anchor``."""
    if mutations.between(anchor, reader, read):
        return False
    return brought(read, anchor, replaced, mutations.places, MOST_MOVED)
