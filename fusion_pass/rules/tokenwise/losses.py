"""Losses of class labels on token values: one number a token, which the graph then reduces."""

from __future__ import annotations

from typing import Any

import torch

from fusedhead.graph.reasons import Escape
from fusedhead.ir.expr import Expr, Plain
from fusedhead.ir.tokenwise import ProgramResult, TokenInput, TokenValue
from fusedhead.rules.table import Context, token_rule
from fusedhead.rules.tokenwise.operands import constants, leaf
from fusedhead.rules.tokenwise.reasons import NotByTokens

aten = torch.ops.aten


@token_rule(aten.cross_entropy_loss.default, aten.nll_loss.default, aten.nll_loss_nd.default)
def nll(context: Context, *args: Any, **kwargs: Any) -> Any:
    """cross_entropy and nll_loss of class labels: one number a token, which the graph then reduces."""
    arguments = context.op._schema.arguments
    bound = {a.name: a.default_value for a in arguments} | dict(zip((a.name for a in arguments), args)) | kwargs
    x, labels, weight = bound["self"], bound["target"], bound["weight"]
    if isinstance(labels, TokenValue) and labels.val.is_floating_point():
        return None  # targets that are probabilities from logits: the loss is decomposed
    if not isinstance(x, TokenValue) or not isinstance(labels, Plain) or isinstance(weight, TokenValue):
        raise Escape(NotByTokens.NOT_FIRST, op=context.op)
    if labels.val.is_floating_point():
        return None  # targets that are probabilities: the loss is decomposed
    if x.tail != tuple(d == (1 if x.val.ndim > 1 else 0) for d in range(x.val.ndim)):
        raise Escape(NotByTokens.CLASS_DIM)
    rows = tuple(False for _ in labels.val.shape)
    label = leaf(labels, rows, labels.val.shape, True)
    whole = None if weight is None else TokenInput(weight, False)
    ignored = constants(bound["ignore_index"])
    smoothing = {"label_smoothing": constants(bound["label_smoothing"])} if "label_smoothing" in bound else {}
    last = {"reduction": 0, "ignore_index": ignored, **smoothing}
    each = TokenValue(Expr(context.op, (x.expr, label, whole), last), labels.val.to(x.val.dtype), rows, x.heads)
    if constants(bound["reduction"]) == 0:
        return each
    wide = {"dtype": torch.float64 if x.val.dtype == torch.float64 else torch.float32}
    out = Expr(aten.sum.default, (ProgramResult(each),), wide)
    if constants(bound["reduction"]) == 1:
        counted: Any = Expr(aten.ne.Scalar, (labels, ignored))
        if weight is not None:
            targets = Expr(aten.mul.Tensor, (Expr(aten.to.dtype, (labels, torch.int64)), counted))
            flat = Expr(aten.reshape.default, (targets, [-1]))
            of_label = Expr(aten.index_select.default, (weight, 0, flat))
            counted = Expr(aten.mul.Tensor, (of_label, Expr(aten.reshape.default, (counted, [-1]))))
        out = Expr(aten.div.Tensor, (out, Expr(aten.sum.default, (counted,))))
    return Plain(Expr(aten.to.dtype, (out, context.val.dtype)), context.val)
