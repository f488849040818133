"""Losses over class labels, rebuilt from row statistics.

With z the logits of a row, y its label, lse = log Σ exp z:

    log p_y = z_y - lse            Σ_v log p_v = Σ_v z_v - V·lse
    cross entropy with smoothing ε and class weights w:
        (1 - ε) w_y (lse - z_y) + ε/V (lse Σ_v w_v - Σ_v w_v z_v)
    mean: divided by Σ w_y over the rows that are not ignored (their number without weights)

(torch/nn/functional.py, cross_entropy; aten/src/ATen/native/LossNLL.cpp.) Everything after the statistics is
ordinary code on [N] vectors, so ignore_index, NaN and reductions mean what they mean in eager code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, Node

from fusedhead.graph.reasons import Escape
from fusedhead.graph.sizes import same_shape
from fusedhead.ir.builder import Emit, named
from fusedhead.ir.expr import Plain
from fusedhead.ir.logits import Logits, LogProbs
from fusedhead.ir.lse_differences import DIFFERENCE, SPREAD, lse_less_picked, spread
from fusedhead.ir.terminal import Kind, Statistics, Terminal
from fusedhead.rules.reasons import NoRule
from fusedhead.rules.row_terms import flat_terms, without_row_terms
from fusedhead.rules.table import Context, needs_logits, over_classes, plain_tensor, register_coverage, rule, vocab_size

aten = torch.ops.aten
register_coverage(
    __name__,
    "loss",
    "`cross_entropy` (mean, sum, none; `ignore_index`, class weights, label smoothing; classes last or in dimension "
    "1), `log_softmax` + `nll_loss`; then any masks and reductions",
    "labels of another shape or dtype than eager code takes",
)
REDUCTION_NAMES = ("none", "mean", "sum")


@rule(aten.log_softmax.int, aten._log_softmax.default, aten.special_log_softmax.default)
def log_softmax(context: Context, value: Any, dim: int, dtype: Any = None, **_: Any) -> LogProbs:
    logits = needs_logits(value, "log_softmax")
    over_classes(dim, logits, "log_softmax")
    if context.val.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise Escape(NoRule.LOG_SOFTMAX_DTYPE, dtype=context.val.dtype)
    return LogProbs(logits, context.val)


def rows_shape(logits: Logits) -> list[Any]:
    return [size for d, size in enumerate(logits.val.shape) if d != logits.class_dim]


class ClassLoss(NamedTuple):
    """The operands and settings of a loss over class labels, as ``F.cross_entropy`` takes them."""

    target: Any
    weight: Any
    reduction: int
    ignore_index: Any
    smoothing: float = 0.0


def class_labels(name: str, logits: Logits, criterion: ClassLoss) -> Plain:
    """The target, if it and the settings are those of a loss over class labels. Raises Escape."""
    target = plain_tensor(criterion.target, "the target")
    if target.val.dtype.is_floating_point:
        raise Escape(NoRule.SOFT_TARGETS)
    if target.val.dtype not in (torch.int64, torch.uint8):
        raise Escape(NoRule.LABEL_DTYPE, dtype=target.val.dtype)
    expected_dim = 0 if logits.val.ndim == 1 else 1
    if logits.class_dim != expected_dim:
        raise Escape(NoRule.CLASS_DIM, op=name, dim=expected_dim, class_dim=logits.class_dim)
    if not same_shape(target.val.shape, rows_shape(logits)):
        raise Escape(NoRule.LABEL_SHAPE, shape=tuple(target.val.shape))
    if not isinstance(criterion.ignore_index, int) or not isinstance(criterion.smoothing, float):
        raise Escape(NoRule.UNKNOWN_CONSTANT)
    if criterion.weight is not None and plain_tensor(criterion.weight, "the class weight").val.requires_grad:
        raise Escape(NoRule.TRAINED_CLASS_WEIGHTS)
    return target


def nll_terminal(
    context: Context,
    name: str,
    logits: Logits,
    criterion: ClassLoss,
    factor: float = 1.0,
    terms: Sequence[Plain] | None = None,
) -> Terminal:
    """factor · cross entropy of class labels, with everything ``F.cross_entropy`` allows for them.

    ``terms``: of the rows, to be added to the logits; they are taken as log-probabilities then, -(z_y + t).
    """
    _, weight, reduction, ignore_index, smoothing = criterion
    target = class_labels(name, logits, criterion)
    size = vocab_size(logits)
    emitted: dict[Graph, tuple[Node, Node]] = {}

    def valid_and_labels(emit: Emit) -> tuple[Node, Node]:
        if emit.graph in emitted:
            return emitted[emit.graph]
        flat = emit.cast(emit.flat(emit.ref(target)), torch.int64)
        valid = named(emit(aten.ne.Scalar, flat, ignore_index), "valid")
        # a product keeps a label that is out of range and not ignored out of range
        emitted[emit.graph] = valid, emit(aten.mul.Tensor, flat, valid)
        return emitted[emit.graph]

    def labels(emit: Emit) -> Node:
        return emit(aten.unsqueeze.default, valid_and_labels(emit)[1], 1)

    def result(emit: Emit, stats: Statistics) -> Node:
        valid, label = valid_and_labels(emit)
        if terms is None:
            loss = lse_less_picked(emit, stats)
        else:
            loss = emit(aten.neg.default, emit(aten.select.int, stats.picked, 1, 0))
            for term in flat_terms(emit, terms, logits.class_dim, emit.sizes(emit.ref(target))):
                loss = emit(aten.sub.Tensor, loss, term)
        row_weight: Node | None = None
        total: Node | float = float(size)
        if weight is not None:
            wide = emit.cast(emit.ref(weight), torch.float32)
            row_weight = emit(aten.index_select.default, wide, 0, label)
            total = emit(aten.sum.default, wide)
            loss = emit(aten.mul.Tensor, loss, row_weight)
        if smoothing:
            loss = emit(
                aten.add.Tensor,
                emit(aten.mul.Tensor, loss, 1.0 - smoothing),
                emit(aten.mul.Tensor, spread(emit, stats, total), smoothing / size),
            )
        if factor != 1.0:
            loss = emit(aten.mul.Tensor, loss, factor)
        # a `where` and no product: an ignored row counts nothing even if its loss is not finite
        loss = emit(aten.where.ScalarOther, valid, loss, 0.0)
        if reduction == 0:
            sizes = emit.sizes(emit.ref(target))
            return loss if len(sizes) == 1 else emit(aten.reshape.default, loss, sizes)
        loss = emit(aten.sum.default, loss)
        if reduction == 1:
            counted = valid if row_weight is None else emit(aten.where.ScalarOther, valid, row_weight, 0.0)
            loss = emit(aten.div.Tensor, loss, emit(aten.sum.default, counted))
        return loss

    details = [REDUCTION_NAMES[reduction], f"ignore_index={ignore_index}"]
    details += [f"label_smoothing={smoothing:g}"] if smoothing else []
    details += ["class weights"] if weight is not None else []
    return Terminal(
        logits,
        context.val,
        Kind.LOSS,
        f"{name}({', '.join(details)})",
        DIFFERENCE | SPREAD if smoothing else DIFFERENCE if terms is None else frozenset({"picked"}),
        result,
        labels,
        label_count=1,
        label_key=(target.ref, ignore_index),
        label_sources=(target,),
        weights=weight if smoothing else None,
        sources=(*(terms or ()), *(() if weight is None else (weight,))),
    )


@rule(aten.cross_entropy_loss.default)
def cross_entropy(
    context: Context,
    value: Any,
    target: Any,
    weight: Any = None,
    reduction: int = 1,
    ignore_index: Any = -100,
    label_smoothing: float = 0.0,
) -> Terminal:
    logits = needs_logits(value, "cross_entropy")
    criterion = ClassLoss(target, weight, reduction, ignore_index, float(label_smoothing))
    return nll_terminal(context, "cross_entropy", logits, criterion)


@rule(aten.nll_loss_nd.default, aten.nll_loss.default, aten.nll_loss2d.default)
def nll_loss(
    context: Context,
    value: Any,
    target: Any,
    weight: Any = None,
    reduction: int = 1,
    ignore_index: Any = -100,
) -> Terminal:
    criterion = ClassLoss(target, weight, reduction, ignore_index)
    if isinstance(value, Logits):  # it may be z - logsumexp(z)
        of, terms = without_row_terms(value)
        return nll_terminal(context, "nll_loss", of, criterion, terms=terms)
    if not isinstance(value, LogProbs):
        raise Escape(NoRule.NLL_OF_OTHER)
    of = replace(value.of, val=value.val)
    name = "log_softmax + nll_loss"
    return nll_terminal(context, name, of, criterion, factor=value.factor)
