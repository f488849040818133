"""Entries of every row, of the logits or of their log-probabilities, and logsumexp.

With z the logits of a row and y one of its labels: z_y, and log p_y = z_y - lse, where lse = log Σ exp z. Their uses
are ordinary code on a few numbers a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from fusedhead.graph.reasons import Escape
from fusedhead.graph.sizes import same_shape
from fusedhead.ir.builder import Emit
from fusedhead.ir.expr import Expr, Plain
from fusedhead.ir.logits import LogProbs, logits_of
from fusedhead.ir.lse_differences import DIFFERENCE, picked_less_lse
from fusedhead.ir.terminal import Kind, Statistics, Terminal
from fusedhead.rules.losses import rows_shape
from fusedhead.rules.reasons import NoRule
from fusedhead.rules.row_terms import without_row_terms
from fusedhead.rules.table import Context, needs_logits, over_classes, plain_tensor, register_coverage, rule, vocab_size

aten = torch.ops.aten
register_coverage(
    __name__,
    "numbers of a row",
    "`log_softmax` + `gather` (any number of labels a row) or `[arange(N), y]`, `gather` − `logsumexp`, z-loss",
    "",
)


def per_row(emit: Emit, flat: Node, stats: Statistics, class_dim: int, keep: bool) -> Node:
    """A [N] result in the rows' own shape, with the class dimension kept as length 1 where asked."""
    sizes = stats.row_sizes()
    shaped = flat if len(sizes) == 1 else emit(aten.reshape.default, flat, sizes)
    return emit(aten.unsqueeze.default, shaped, class_dim) if keep else shaped


@rule(aten.gather.default)
def gather(context: Context, value: Any, dim: int, index: Any, *, sparse_grad: bool = False) -> Terminal:
    return entries(context, value, dim, index, Kind.GATHER)


def entries(context: Context, value: Any, dim: int, index: Any, kind: Kind) -> Terminal:
    """K entries a row: logits (z_y) or log-probabilities (z_y - lse)."""
    logits = value.of if isinstance(value, LogProbs) else needs_logits(value, "gather")
    over_classes(dim, logits, "gather")
    logits, terms = (logits, []) if isinstance(value, LogProbs) else without_row_terms(logits)
    index = plain_tensor(index, "the index of gather")
    class_dim = logits.class_dim
    if index.val.ndim != logits.val.ndim:  # eager code allows it of an index without entries
        raise Escape(NoRule.GATHER_ROWS)
    picked = index.val.shape[class_dim]
    token_sizes = [size for d, size in enumerate(index.val.shape) if d != class_dim]
    if not isinstance(picked, int) or not same_shape(token_sizes, rows_shape(logits)):
        raise Escape(NoRule.GATHER_ROWS)
    if index.val.dtype != torch.int64:
        raise Escape(NoRule.GATHER_DTYPE, dtype=index.val.dtype)

    def labels(emit: Emit) -> Node:
        last = emit.last(emit.ref(index), class_dim)
        return last if last.meta["example_value"].ndim == 2 else emit(aten.reshape.default, last, [-1, picked])

    def result(emit: Emit, stats: Statistics) -> Node:
        assert stats.picked is not None
        out = stats.picked
        if isinstance(value, LogProbs):
            out = picked_less_lse(emit, stats)
            out = emit(aten.mul.Tensor, out, value.factor) if value.factor != 1.0 else out
        sizes = stats.row_sizes()
        out = out if len(sizes) == 1 else emit(aten.reshape.default, out, [*sizes, picked])
        out = out if class_dim == len(sizes) else emit(aten.movedim.int, out, -1, class_dim)
        for term in terms:
            out = emit(aten.add.Tensor, out, emit.ref(term))
        return out

    name = f"log_softmax + {kind.value}" if isinstance(value, LogProbs) else kind.value
    count = "" if picked == 1 else f" ({picked} labels a row)"
    return Terminal(
        logits,
        context.val,
        kind,
        name + count,
        DIFFERENCE if isinstance(value, LogProbs) else frozenset({"picked"}),
        result,
        labels,
        label_count=picked,
        label_key=(index.ref,),
        label_sources=(index,),
        sources=tuple(terms),
    )


@rule(aten.take_along_dim.default)
def take_along_dim(context: Context, value: Any, index: Any, dim: int | None = None) -> Terminal:
    if dim is None or not isinstance(index, Plain) or index.val.ndim != value.val.ndim:
        raise Escape(NoRule.TAKE_ALONG_DIM)
    size = vocab_size(logits_of(value))
    inside = Expr(aten.remainder.Scalar, (index.ref, size))  # unlike gather it takes any index, modulo the size
    return gather(context, value, dim, Plain(inside, index.val))


@rule(aten.logsumexp.default, aten.special_logsumexp.default)
def logsumexp(context: Context, value: Any, dim: Sequence[int] | int, keepdim: bool = False) -> Terminal:
    logits = needs_logits(value, "logsumexp")
    dims = [dim] if isinstance(dim, int) else list(dim)
    if len(dims) != 1:
        raise Escape(NoRule.LOGSUMEXP_DIMS)
    over_classes(dims[0], logits, "logsumexp")

    def result(emit: Emit, stats: Statistics) -> Node:
        return per_row(emit, stats.lse, stats, logits.class_dim, keepdim)

    return Terminal(logits, context.val, Kind.LSE, "logsumexp", frozenset(), result)
