"""Statistics of a `StackedProjection`: one sweep a head, gathered in the program's order of rows.

The program's row steps are replayed on row indices, which then tell the origin of each row. Labels are scattered to
their heads by these indices, and statistics are gathered.
"""

from __future__ import annotations

import operator
from functools import partial
from typing import Any

import torch
from torch.fx import Node

from fusedhead.graph.nodes import fake
from fusedhead.ir.builder import Emit, named
from fusedhead.ir.logits import Logits, StackedProjection
from fusedhead.ir.stack_parts import stacked_part
from fusedhead.kernels.contract import STATS
from fusedhead.kernels.transform.transform import Transform
from fusedhead.rewrite.operands import emit_operands, replay
from fusedhead.rewrite.sweeps import SweepGroup, roundings_of

aten = torch.ops.aten


def numbers_of_rows(emit: Emit, logits: Logits) -> tuple[list[Any], Node | None]:
    """The shape of the stacked rows, and the index of each row of the program among them; None if they are in order."""
    head = logits.head
    stack = emit.ref(head.hidden)
    sizes = emit.sizes(stack)[:-1]
    if all(step.keeps_order for step in logits.row_steps):
        return sizes, None
    one = emit(aten.select.int, stack, -1, 0)
    count = fake(one).numel()
    total = count if isinstance(count, int) else emit(aten.sym_numel.default, one)
    numbered = emit(aten.reshape.default, emit(aten.arange.default, total, device=fake(stack).device), [*sizes, 1])
    moved = emit.last(replay(emit, numbered, logits.row_steps, 1), logits.class_dim)
    return sizes, named(emit(aten.reshape.default, moved, [-1]), "place")


def stacked_statistics(emit: Emit, group: SweepGroup, memory: int) -> tuple[dict[str, Node], list[Node]]:
    """The statistics of a group of terminals on stacked heads, and the calls that compute them."""
    logits = group.logits
    head = logits.head
    assert isinstance(head, StackedProjection)
    sizes, place = numbers_of_rows(emit, logits)
    picks = [label(emit) for label in group.labels]
    labels = (picks[0] if len(picks) == 1 else emit(aten.cat.default, picks, 1)) if picks else None
    width = fake(labels).shape[1] if labels is not None else 0
    if labels is not None:
        if place is not None:
            empty = emit(aten.new_zeros.default, labels, [product_of_sizes(emit, sizes), width])
            labels = emit(aten.index_copy.default, empty, 0, place, labels)
        labels = emit(aten.reshape.default, labels, [*sizes, width])
    chain = next(iter(roundings_of(group.terminals)), None)
    calls: list[Node] = []
    statistics: dict[str, list[Node]] = {name: [] for name in group.want}
    for k, part in enumerate(head.parts):
        mine = stacked_part(logits, part)
        head_labels = None if labels is None else emit(aten.select.int, labels, head.dim, k)
        flat = None if head_labels is None else emit(aten.reshape.default, head_labels, [-1, width])
        tensors = emit_operands(emit, mine, () if flat is None else (partial(emitted_labels, flat),), group.weights)
        text = Transform(mine.steps).text if chain is not None else Transform(mine.steps).smooth.text
        op = torch.ops.fusedhead.head_stats.default
        call = named(emit(op, *tensors, text, ",".join(group.want), memory), "head")
        calls.append(call)
        for name in group.want:
            statistics[name].append(named(emit(operator.getitem, call, STATS.index(name)), name))
    rows = [size for d, size in enumerate(sizes) if d != head.dim]
    for name, stats in statistics.items():  # after all sweeps: a loss that is linear in one is linear in all of them
        shape = [*rows, width] if name == "picked" else rows
        statistics[name] = [emit(aten.reshape.default, stat, shape) for stat in stats]
    return {name: in_order(emit, stats, head.dim, place, name == "picked") for name, stats in statistics.items()}, calls


def emitted_labels(labels: Node, emit: Emit) -> Node:
    """Labels that have been emitted already."""
    return labels


def in_order(emit: Emit, stats: list[Node], dim: int, place: Node | None, picked: bool) -> Node:
    """The concatenated statistics of the heads, [M] or [M, K], in the program's order of rows."""
    joined = emit(aten.stack.default, stats, dim)
    flat = emit(aten.reshape.default, joined, [-1, fake(stats[0]).shape[-1]] if picked else [-1])
    return flat if place is None else emit(aten.index_select.default, flat, 0, place)


def product_of_sizes(emit: Emit, sizes: list[Any]) -> Any:
    total: Any = 1
    for size in sizes:
        both = isinstance(total, int) and isinstance(size, int)
        total = total * size if both else emit(operator.mul, total, size)
    return total
