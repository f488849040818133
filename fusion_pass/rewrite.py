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
import fusedhead.lowering.row_ops  # noqa: F401  register torch.ops.fusedhead
from fusedhead.emit import Emit, named
from fusedhead.groups import Batch, Group, batches, roundings_of
from fusedhead.interpret import Site
from fusedhead.kernels.columns import Transform
from fusedhead.kernels.contract import STATS
from fusedhead.read import fake, name_of
from fusedhead.safety import Mutations
from fusedhead.terminals import Statistics, Terminal
from fusedhead.values import HIDDEN, Logits, Projection, RowStep, RowVector

aten = torch.ops.aten
def replay(emit: Emit, start: Node, steps: Sequence[RowStep], width: Any) -> Node:
    """Row steps on a tensor that has length ``width`` where the logits have their classes."""
    node = start
    for step in steps:
        args = [[width if s is HIDDEN else s for s in a] if isinstance(a, list) else a for a in step.args]
        node = emit(step.op, node, *(resolve(emit, a) for a in args))
    return node


def resolve(emit: Emit, arg: Any) -> Any:
    if isinstance(arg, list):
        return [resolve(emit, a) for a in arg]
    return emit.ref(arg)


def flat(emit: Emit, node: Node, width: int) -> Node:
    return node if fake(node).ndim == 2 else emit(aten.reshape.default, node, [-1, width])


def row_vector(emit: Emit, hidden: Node, logits: Logits, vector: RowVector) -> Node:
    """A row vector in float32, brought through the remaining row steps to [N]."""
    before = replay(emit, hidden, logits.row_steps[: vector.after], logits.head.weight.val.shape[1])
    sizes = emit.sizes(before)
    sizes[vector.class_dim] = 1
    node = emit.cast(emit.ref(vector.value), torch.float32)
    if fake(node).device != fake(hidden).device:
        node = emit(aten.to.device, node, fake(hidden).device, torch.float32)
    node = emit(aten.expand.default, node, sizes)
    node = replay(emit, node, logits.row_steps[vector.after :], 1)
    return emit.flat(emit.last(node, logits.class_dim))


def joined_operands(emit: Emit, batch: Batch) -> tuple[list[Node], list[Any]]:
    """`operands` of several groups, one after the other, and how many rows each has."""
    each = [operands(emit, group) for group in batch]
    counts = [emit.sizes(h)[0] for h, *_ in each]
    if len(batch) == 1:
        return each[0], counts
    h, w, y, cols, rows, u = (list(nodes) for nodes in zip(*each))
    cat = aten.cat.default
    return [emit(cat, h, 0), w[0], emit(cat, y, 0), cols[0], emit(cat, rows, 1), u[0]], counts


def operands(emit: Emit, group: Group) -> list[Node]:
    """The six tensors of an op call: h, w, y, cols, rows, u."""
    logits = group.first.logits
    head = logits.head
    quiet_cols, quiet_rows = logits.detached or (0, 0)

    def detach(node: Node, quiet: bool = logits.detached is not None) -> Node:
        return emit(aten.detach.default, node) if quiet else node

    hidden = emit.cast(emit.ref(head.hidden), head.dtype)
    weight = emit.cast(emit.ref(head.weight), head.dtype)
    width = head.weight.val.shape[1]
    if logits.vocab is not None:
        weight = emit(aten.slice.Tensor, weight, 0, *logits.vocab)
    shaped = emit.last(replay(emit, hidden, logits.row_steps, width), logits.class_dim)
    h = detach(flat(emit, shaped, width))
    w = detach(weight)
    keyed = {t.label_key: t for _, t in group.terminals if t.labels is not None}
    picks = [t.labels(emit) for t in keyed.values() if t.labels is not None]
    tokens, vocab = emit.sizes(h)[0], emit.sizes(w)[0]
    cols = [detach(emit.cast(emit.ref(c), torch.float32), i < quiet_cols) for i, c in enumerate(logits.cols)]
    rows = [detach(row_vector(emit, hidden, logits, r), i < quiet_rows) for i, r in enumerate(logits.rows)]
    weights = next((t.weights for _, t in group.terminals if t.weights is not None), None)

    def empty(name: str, *shape: Any, dtype: torch.dtype = torch.float32) -> Node:
        return named(emit(aten.new_empty.default, h, list(shape), dtype=dtype), name)

    def joined(op: Any, nodes: list[Node], *args: Any) -> Node:
        return nodes[0] if len(nodes) == 1 and op is aten.cat.default else emit(op, nodes, *args)

    return [
        h,
        w,
        joined(aten.cat.default, picks, 1) if picks else empty("no_labels", tokens, 0, dtype=torch.int64),
        joined(aten.stack.default, cols) if cols else empty("no_columns", 0, vocab),
        joined(aten.stack.default, rows) if rows else empty("no_rows", 0, tokens),
        empty("unweighted", 0) if weights is None else emit.cast(emit.ref(weights), torch.float32),
    ]


def columns_of(group: Group, terminal: Terminal) -> tuple[int, int]:
    """Which of the group's K picked entries are this terminal's."""
    begin = 0
    for key, count in group.picks:
        if key == terminal.label_key:
            return begin, begin + count
        begin += count
    raise AssertionError("a terminal without labels asked for picked entries")


def rebuild(
    emit: Emit, group: Group, statistics: dict[str, Node], node: Node, terminal: Terminal, grad: bool
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
        result = (
            result if grad else emit(aten.detach.default, result)
        )  # it may be a statistic that others differentiate
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
PURE_VIEWS = frozenset({"t", "transpose", "getattr", "view", "reshape", "permute", "size", "to", "float"})


def fuse(
    graph: Graph, sites: Sequence[Site], memory: int, grad: dict[Node, bool], mutations: Mutations
) -> list[tuple[Node, list[Projection]]]:
    """Rewrite sites with ``head_stats`` calls. Returns each call and the heads that it serves."""
    calls, emit = [], Emit(graph)
    old = {node for site in sites for node in (site.head.node, *site.followed, *(n for n, _ in site.terminals))}
    for batch in batches(graph, sites, grad, mutations):
        calls.append((sweep_of(emit, batch, memory, grad, mutations.position), [g.first.logits.head for g in batch]))
    for node, rows in (size for site in sites for size in site.sizes):
        with emit.before(node, node, grad=grad[node]):
            node.replace_all_uses_with(emit(aten.sym_size.int, emit.ref(rows), *node.args[1:]))
        node.graph.erase_node(node)
    made = set(emit.made)
    erase(old, lambda node: node in old or node in made or name_of(node) in PURE_VIEWS)
    erase(reversed(emit.made), made.__contains__)
    kept = [node.name for node in old if not node._erased]
    assert not kept, f"{', '.join(kept)} would still be computed"  # the caller then keeps the original graph
    return [(call, heads) for call, heads in calls if not call._erased]  # what nobody uses takes its sweep with it


def cut(emit: Emit, whole: dict[str, Node], counts: Sequence[Any]) -> dict[str, list[Node]]:
    """Statistics by the groups whose rows they are of; ``counts`` rows each, ints or nodes."""
    if len(counts) == 1:
        return {name: [stat] for name, stat in whole.items()}
    ends = [counts[0]]
    for count in counts[1:]:
        both = isinstance(ends[-1], int) and isinstance(count, int)
        ends.append(ends[-1] + count if both else emit(operator.add, ends[-1], count))
    bounds = list(zip([0, *ends], ends))
    return {name: [emit(aten.slice.Tensor, stat, 0, *bound) for bound in bounds] for name, stat in whole.items()}


def sweep_of(emit: Emit, batch: Batch, memory: int, grad: dict[Node, bool], position: dict[Node, int]) -> Node:
    """One ``head_stats`` call, and its terminals rebuilt from its results."""
    first = batch[0]
    anchor = first.anchor(position)
    with emit.before(anchor, anchor, grad=grad[anchor]):
        tensors, counts = joined_operands(emit, batch)
        chain = next(iter(roundings_of(first.terminals)), None)
        text = Transform(first.first.logits.steps).smooth.text if chain is None else Transform(chain).text
        op = torch.ops.fusedhead.head_stats.default
        call = named(emit(op, *tensors, text, ",".join(first.want), memory), "head")
        whole = {name: named(emit(operator.getitem, call, STATS.index(name)), name) for name in first.want}
        pieces = cut(emit, whole, counts)
    for i, group in enumerate(batch):
        statistics = {name: stats[i] for name, stats in pieces.items()}
        for node, terminal in group.terminals:
            rebuild(emit, group, statistics, node, terminal, grad[node])
    return call
