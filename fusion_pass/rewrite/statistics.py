"""Replaces a site: the row steps are replayed on h, one sweep computes the statistics, each terminal is rebuilt from
them.

Terminals that read the same rows through the same transform share one ``head_stats`` call. Old nodes are
erased one by one: general dead code elimination is not sound on a graph that still writes in place.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

import fusedhead.lowering.ops
import fusedhead.lowering.token_ops  # noqa: F401  register torch.ops.fusedhead
from fusedhead.analysis.body import Body, Emitted
from fusedhead.analysis.site import Site
from fusedhead.analysis.token_regions import erase_unused
from fusedhead.graph.edit import erase
from fusedhead.graph.facts import GraphFacts
from fusedhead.graph.nodes import fake, name_of
from fusedhead.graph.op_names import REMADE_FREELY
from fusedhead.ir.builder import Emit, named
from fusedhead.ir.logits import StackedProjection
from fusedhead.ir.terminal import Statistics, Terminal
from fusedhead.kernels.contract import STATS
from fusedhead.kernels.transform.transform import Transform
from fusedhead.rewrite import shard_sweeps, stacked_sweeps
from fusedhead.rewrite.operands import joined_operands, replay
from fusedhead.rewrite.sweeps import Batch, SweepGroup, batches, roundings_of

aten = torch.ops.aten


def picked_range(group: SweepGroup, terminal: Terminal) -> tuple[int, int]:
    """The columns of the group's K picked entries that belong to a terminal."""
    begin = 0
    for key, count in group.picks:
        if key == terminal.label_key:
            return begin, begin + count
        begin += count
    raise AssertionError("a terminal without labels asked for picked entries")


def rebuild_terminal(
    emit: Emit, group: SweepGroup, statistics: dict[str, Node], reader: tuple[Node, Terminal], grad: bool
) -> None:
    """Replace one terminal by its result, computed from the statistics."""
    node, terminal = reader
    logits = terminal.logits

    def row_sizes() -> list[Any]:
        hidden = emit.ref(logits.head.hidden)
        shaped = replay(emit, hidden, logits.row_steps, logits.head.weight.val.shape[1])
        return emit.sizes(emit.last(shaped, logits.class_dim))[:-1]

    with emit.before(node, node, grad=grad):
        by_name = {name: statistics[name] for name in terminal.want if name not in ("picked", "sum")}
        picked = statistics["picked"] if terminal.labels is not None else None
        if picked is not None:
            begin, end = picked_range(group, terminal)
            if (begin, end) != (0, fake(picked).shape[1]):
                picked = emit(aten.slice.Tensor, picked, 1, begin, end)
        total = statistics["sum"] if "sum" in terminal.want else None
        result = terminal.result(emit, Statistics(statistics["lse"], picked, total, row_sizes, by_name))
        if not grad:  # it may be a statistic that another terminal differentiates
            result = emit(aten.detach.default, result)
        replacement = emit.cast(result, terminal.val.dtype)
        node.replace_all_uses_with(replacement)
        emit.replaced(node, replacement)


def run(body: Body) -> None:
    """Replace fused sites by ``head_stats`` calls."""
    erase_unused(body.reading, {site.head for site, *_ in body.fused()})
    sites = [site for site, *_ in body.fused()]
    body.emitted += emit_sweeps(sites, body.facts, body.options.budget)


def emit_sweeps(sites: Sequence[Site], facts: GraphFacts, memory: int) -> list[Emitted]:
    """Emit the ``head_stats`` calls of each batch of sweeps, and return them with the heads that they serve."""
    if not sites:
        return []
    batched, emit = [], Emit(facts.graph)
    old = {node for site in sites for node in (site.head.node, *site.followed, *(n for n, _ in site.terminals))}
    for batch in batches(sites, facts):
        heads = [group.logits.head for group in batch]
        batched.append((sweeps_of(emit, batch, facts, memory), heads))
    emitted = set(emit.nodes)
    erase(old, lambda node: node in old or node in emitted or name_of(node) in REMADE_FREELY)
    erase(reversed(emit.nodes), emitted.__contains__)
    computed = [node.name for node in old if not node._erased]
    assert not computed, f"{', '.join(computed)} would still be computed"  # the caller then keeps the original graph
    used = [([call for call in calls if not call._erased], heads) for calls, heads in batched]
    return [Emitted(calls, heads, False) for calls, heads in used if calls]  # unused sweeps are erased


def count_elsewhere(body: Body) -> None:
    """Replace row counts that are read from logits by reads of a tensor of equal length that stays in the graph."""
    sizes = [size for site, *_ in body.fused() for size in site.sizes]
    emit = Emit(body.graph) if sizes else None
    for node, rows in sizes:
        assert emit is not None
        if node.users:
            with emit.before(node, node, grad=body.facts.grad_mode(node)):
                node.replace_all_uses_with(emit(aten.sym_size.int, emit.ref(rows), *node.args[1:]))
        body.graph.erase_node(node)


def split_rows(emit: Emit, whole: dict[str, Node], counts: Sequence[Any]) -> dict[str, list[Node]]:
    """Split statistics by groups of rows. ``counts``: the rows of each group, ints or nodes."""
    if len(counts) == 1:
        return {name: [stat] for name, stat in whole.items()}
    ends = [counts[0]]
    for count in counts[1:]:
        both = isinstance(ends[-1], int) and isinstance(count, int)
        ends.append(ends[-1] + count if both else emit(operator.add, ends[-1], count))
    bounds = list(zip([0, *ends], ends))
    return {name: [emit(aten.slice.Tensor, stat, 0, *bound) for bound in bounds] for name, stat in whole.items()}


def sweeps_of(emit: Emit, batch: Batch, facts: GraphFacts, memory: int) -> list[Node]:
    """Emit the ``head_stats`` call of a batch, or those of stacked heads, and rebuild the terminals."""
    anchor = batch[0].anchor(facts.position)
    with emit.before(anchor, anchor, grad=facts.grad_mode(anchor)):
        if isinstance(batch[0].logits.head, StackedProjection):
            statistics, calls = stacked_sweeps.stacked_statistics(emit, batch[0], memory)
            pieces = {name: [stat] for name, stat in statistics.items()}
        else:
            pieces, calls = statistics_of(emit, batch, memory)
    for i, group in enumerate(batch):
        for node, terminal in group.terminals:
            of_group = {name: stats[i] for name, stats in pieces.items()}
            rebuild_terminal(emit, group, of_group, (node, terminal), facts.grad_mode(node))
    return calls


def statistics_of(emit: Emit, batch: Batch, memory: int) -> tuple[dict[str, list[Node]], list[Node]]:
    """The statistics of each group of a batch, and the call that computes them."""
    first = batch[0]
    tensors, counts = joined_operands(emit, batch)
    chain = next(iter(roundings_of(first.terminals)), None)
    text = Transform(first.logits.steps).smooth.text if chain is None else Transform(chain).text
    if shard_sweeps.in_shards(batch):
        call = shard_sweeps.sweep_call(emit, batch, tensors, text, memory)
    else:
        op = torch.ops.fusedhead.head_stats.default
        call = named(emit(op, *tensors, text, ",".join(first.want), memory), "head")
    whole = {name: named(emit(operator.getitem, call, STATS.index(name)), name) for name in first.want}
    return split_rows(emit, whole, counts), [call]
