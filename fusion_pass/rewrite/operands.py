"""The operands of a head's op: h, w, y, cols, rows and u, emitted from the steps of the logits.

Row steps are replayed on the hidden states, and on the vectors along the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from fusedhead.graph.nodes import fake
from fusedhead.ir.builder import Emit, named
from fusedhead.ir.expr import Plain
from fusedhead.ir.logits import HIDDEN, Logits, RowStep, RowVector
from fusedhead.ir.terminal import Labels
from fusedhead.rewrite.sweeps import Batch

aten = torch.ops.aten


def replay(emit: Emit, start: Node, steps: Sequence[RowStep], width: Any) -> Node:
    """Apply row steps to a tensor that has length ``width`` in the class dimension."""
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
    """A row vector in float32, taken through the remaining row steps to [N]."""
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
    """The concatenated operands of several groups (`emit_operands`), and the number of rows of each."""
    each = [emit_operands(emit, group.logits, group.labels, group.weights) for group in batch]
    counts = [emit.sizes(h)[0] for h, *_ in each]
    if len(batch) == 1:
        return each[0], counts
    h, w, y, cols, rows, u = (list(nodes) for nodes in zip(*each))
    cat = aten.cat.default
    return [emit(cat, h, 0), w[0], emit(cat, y, 0), cols[0], emit(cat, rows, 1), u[0]], counts


def emit_operands(
    emit: Emit, logits: Logits, labels: Sequence[Labels] = (), weights: Plain | None = None
) -> list[Node]:
    """The six tensors of an op call: h [N, D], w [V, D], y [N, K], cols [C, V], rows [R, N] and u, [V] or empty.

    ``labels`` emit the columns of y; ``weights`` becomes u.
    """
    head = logits.head
    detached_cols, detached_rows = logits.detached or (0, 0)

    def detach(node: Node, really: bool = logits.detached is not None) -> Node:
        return emit(aten.detach.default, node) if really else node

    hidden = emit.cast(emit.ref(head.hidden), head.dtype)
    weight = emit.cast(emit.ref(head.weight), head.dtype)
    width = head.weight.val.shape[1]
    if logits.vocab is not None:
        weight = emit(aten.slice.Tensor, weight, 0, *logits.vocab)
    shaped = emit.last(replay(emit, hidden, logits.row_steps, width), logits.class_dim)
    h = detach(flat(emit, shaped, width))
    w = detach(weight)
    picks = [label(emit) for label in labels]
    tokens, vocab = emit.sizes(h)[0], emit.sizes(w)[0]
    cols = [detach(emit.cast(emit.ref(c), torch.float32), i < detached_cols) for i, c in enumerate(logits.cols)]
    rows = [detach(row_vector(emit, hidden, logits, r), i < detached_rows) for i, r in enumerate(logits.rows)]

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
