"""Replacing a site: the row steps are replayed on h, the head runs once, each terminal is rebuilt from statistics.

Terminals that read the same rows through the same transform share one ``head_stats`` call. Nothing here proves
anything: a site arrives readable and safe. The old nodes are erased one by one, never by a general dead code
elimination, which is not sound on a graph that still mutates.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.fx import Graph, Node

import fusedhead.lowering.ops
import fusedhead.lowering.token_ops  # noqa: F401  register torch.ops.fusedhead
from fusedhead.analysis.interpreter import Site
from fusedhead.graph.nodes import fake, name_of
from fusedhead.ir.builder import Emit, named
from fusedhead.ir.logits import Projection, StackedProjection
from fusedhead.ir.terminal import Statistics, Terminal
from fusedhead.kernels.contract import STATS
from fusedhead.kernels.transform.transform import Transform
from fusedhead.legality.checks import Mutations
from fusedhead.rewrite import stacked_sweeps
from fusedhead.rewrite.operands import joined_operands, replay
from fusedhead.rewrite.sweeps import Batch, SweepGroup, batches, roundings_of

aten = torch.ops.aten


def columns_of(group: SweepGroup, terminal: Terminal) -> tuple[int, int]:
    """Which of the group's K picked entries are this terminal's."""
    begin = 0
    for key, count in group.picks:
        if key == terminal.label_key:
            return begin, begin + count
        begin += count
    raise AssertionError("a terminal without labels asked for picked entries")


def rebuild(
    emit: Emit, group: SweepGroup, statistics: dict[str, Node], node: Node, terminal: Terminal, grad: bool
) -> None:
    """Replace one terminal by its result from the statistics."""
    logits = terminal.logits

    def row_sizes() -> list[Any]:
        hidden = emit.ref(logits.head.hidden)
        shaped = replay(emit, hidden, logits.row_steps, logits.head.weight.val.shape[1])
        return emit.sizes(emit.last(shaped, logits.class_dim))[:-1]

    with emit.before(node, node, grad=grad):
        others = {name: statistics[name] for name in terminal.want if name not in ("picked", "sum")}
        picked = statistics["picked"] if terminal.labels is not None else None
        if picked is not None:
            begin, end = columns_of(group, terminal)
            if (begin, end) != (0, fake(picked).shape[1]):
                picked = emit(aten.slice.Tensor, picked, 1, begin, end)
        total = statistics["sum"] if "sum" in terminal.want else None
        result = terminal.result(emit, Statistics(statistics["lse"], picked, total, row_sizes, **others))
        if not grad:  # it may be a statistic that others differentiate
            result = emit(aten.detach.default, result)
        replacement = emit.cast(result, terminal.val.dtype)
        node.replace_all_uses_with(replacement)
        emit.replaced(node, replacement)


def erase(nodes: Iterable[Node], removable: Callable[[Node], bool]) -> None:
    """Erase nodes without users, and such inputs of theirs as thereby lose their last one and are removable."""
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if not node._erased and not node.users and removable(node):
            sources = node.all_input_nodes
            node.graph.erase_node(node)
            stack.extend(sources)


# Pure by their semantics: an input of a replaced node that only re-views or reads may go with it.
PURE_VIEWS = frozenset(
    {"t", "transpose", "T", "mT", "H", "mH", "real", "view", "reshape", "permute", "size", "to", "float"}
)


def fuse(
    graph: Graph, sites: Sequence[Site], memory: int, grad: dict[Node, bool], mutations: Mutations
) -> list[tuple[list[Node], list[Projection]]]:
    """Rewrite sites with ``head_stats`` calls. Returns the calls of each batch and the heads that they serve."""
    calls, emit = [], Emit(graph)
    old = {node for site in sites for node in (site.head.node, *site.followed, *(n for n, _ in site.terminals))}
    for batch in batches(sites, grad, mutations):
        heads = [group.logits.head for group in batch]
        calls.append((sweeps_of(emit, batch, memory, grad, mutations.position), heads))
    made = set(emit.made)
    erase(old, lambda node: node in old or node in made or name_of(node) in PURE_VIEWS)
    erase(reversed(emit.made), made.__contains__)
    kept = [node.name for node in old if not node._erased]
    assert not kept, f"{', '.join(kept)} would still be computed"  # the caller then keeps the original graph
    left = [([call for call in some if not call._erased], heads) for some, heads in calls]
    return [(some, heads) for some, heads in left if some]  # what nobody uses takes its sweep with it


def count_elsewhere(graph: Graph, sites: Sequence[Site], grad: dict[Node, bool]) -> None:
    """Numbers of rows that the graph reads off logits, read off what is as long and stays."""
    emit = Emit(graph)
    for node, rows in (size for site in sites for size in site.sizes):
        if node.users:
            with emit.before(node, node, grad=grad[node]):
                node.replace_all_uses_with(emit(aten.sym_size.int, emit.ref(rows), *node.args[1:]))
        graph.erase_node(node)


def split_rows(emit: Emit, whole: dict[str, Node], counts: Sequence[Any]) -> dict[str, list[Node]]:
    """Statistics by the groups whose rows they are of; ``counts`` rows each, ints or nodes."""
    if len(counts) == 1:
        return {name: [stat] for name, stat in whole.items()}
    ends = [counts[0]]
    for count in counts[1:]:
        both = isinstance(ends[-1], int) and isinstance(count, int)
        ends.append(ends[-1] + count if both else emit(operator.add, ends[-1], count))
    bounds = list(zip([0, *ends], ends))
    return {name: [emit(aten.slice.Tensor, stat, 0, *bound) for bound in bounds] for name, stat in whole.items()}


def sweeps_of(emit: Emit, batch: Batch, memory: int, grad: dict[Node, bool], position: dict[Node, int]) -> list[Node]:
    """The ``head_stats`` call of a batch, or those of stacked heads, with the terminals rebuilt from their results."""
    anchor = batch[0].anchor(position)
    with emit.before(anchor, anchor, grad=grad[anchor]):
        if isinstance(batch[0].logits.head, StackedProjection):
            statistics, calls = stacked_sweeps.statistics_of(emit, batch[0], memory)
            pieces = {name: [stat] for name, stat in statistics.items()}
        else:
            pieces, calls = statistics_of(emit, batch, memory)
    for i, group in enumerate(batch):
        for node, terminal in group.terminals:
            rebuild(emit, group, {name: stats[i] for name, stats in pieces.items()}, node, terminal, grad[node])
    return calls


def statistics_of(emit: Emit, batch: Batch, memory: int) -> tuple[dict[str, list[Node]], list[Node]]:
    """The statistics of each group of a batch, and the call that makes them."""
    first = batch[0]
    tensors, counts = joined_operands(emit, batch)
    chain = next(iter(roundings_of(first.terminals)), None)
    text = Transform(first.logits.steps).smooth.text if chain is None else Transform(chain).text
    op = torch.ops.fusedhead.head_stats.default
    call = named(emit(op, *tensors, text, ",".join(first.want), memory), "head")
    whole = {name: named(emit(operator.getitem, call, STATS.index(name)), name) for name in first.want}
    return split_rows(emit, whole, counts), [call]
