"""One entry of every row, by an index that counts the rows: ``z[arange(N), y]``, ``z[range(N), y]`` and
``z[arange(B)[:, None], arange(T), y]``.

That is ``gather`` where each index but the last counts its own dimension from 0 and nothing writes to it. A negative
label counts from the last class, as in any index.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fusedhead.graph.aliases import storages
from fusedhead.graph.effects import may_write
from fusedhead.graph.nodes import fake, name_of
from fusedhead.graph.reasons import Escape
from fusedhead.graph.sizes import same_shape
from fusedhead.ir.builder import Emit
from fusedhead.ir.expr import Expr, Plain
from fusedhead.ir.logits import from_the_first, logits_of
from fusedhead.ir.terminal import Kind, Statistics, Terminal
from fusedhead.rules.gather import entries
from fusedhead.rules.losses import rows_shape
from fusedhead.rules.reasons import NoRule
from fusedhead.rules.table import Context, vocab_size

aten = torch.ops.aten
INDEX_VIEWS = frozenset({"unsqueeze", "view", "reshape", "getitem"})  # with no more than one dimension longer than 1


def counts(index: Plain) -> bool:
    """Whether a tensor's values are 0, 1, 2 ... in order."""
    node = index.ref
    if isinstance(node, Expr):  # a list in the program (`evaluator.constant`), created anew: nothing writes to it
        lifted = node.args[0].ref if node.op is aten.lift_fresh_copy.default else node
        return isinstance(lifted, Expr) and lifted.op is aten.arange.default and len(lifted.args) == 1
    while isinstance(node, Node) and name_of(node) in INDEX_VIEWS:
        if name_of(node) == "getitem":
            picks = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
            if any(not (pick is None or pick is Ellipsis or pick == slice(None)) for pick in picks):
                return False
        node = node.args[0]
    if not isinstance(node, Node) or name_of(node) != "arange":
        return False
    start: Any = 0
    step: Any = 1
    if len(node.args) > 1 or "start" in node.kwargs:
        start = node.args[0] if len(node.args) > 1 else node.kwargs["start"]
        step = node.args[2] if len(node.args) > 2 else node.kwargs.get("step", 1)
    memory = storages(node)
    untouched = not any(may_write(other, memory) for other in node.graph.nodes)
    return start == 0 and step == 1 and fake(node).dtype == torch.int64 and untouched


def counts_along(index: Tensor, dim: int, sizes: Sequence[Any]) -> bool:
    """Whether a tensor that broadcasts to ``sizes`` is as long as dimension ``dim``, and 1 in all others."""
    shape = [1] * (len(sizes) - index.ndim) + list(index.shape)
    return same_shape(shape, [size if d == dim else 1 for d, size in enumerate(sizes)])


def entry_of_each_row(context: Context, value: Any, indices: Sequence[Plain]) -> Terminal:
    """z[i0, ..., y] [rows], with the class dimension last. Raises Escape where the rows are not simply counted."""
    logits, (*counted, label) = logits_of(value), indices
    sizes = rows_shape(logits)
    if len(indices) != logits.val.ndim or not same_shape(list(label.val.shape), sizes):
        raise Escape(NoRule.INDEX_ALONG_VOCABULARY)
    if not all(counts(index) and counts_along(index.val, dim, sizes) for dim, index in enumerate(counted)):
        raise Escape(NoRule.ROWS_NOT_COUNTED)
    labels = from_the_first(label.ref, vocab_size(logits))
    column, dim = Plain(Expr(aten.unsqueeze.default, (labels, -1)), label.val.unsqueeze(-1)), logits.class_dim
    terminal = entries(replace(context, val=context.val.unsqueeze(-1)), value, dim, column, Kind.INDEX)

    def result(emit: Emit, stats: Statistics) -> Node:
        return emit(aten.squeeze.dim, terminal.result(emit, stats), -1)

    return replace(terminal, val=context.val, result=result, label_key=("index", label.ref))
