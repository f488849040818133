"""Elementwise ops on the logits, which become steps of the head's `Transform`.

A step's operand is a constant, one number a class (a column vector), or one number a token (a row vector);
an operand that varies along both is no step. Casts are no steps: every engine computes in float32, and `Logits.step`
notes where the program rounds.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fusedhead.compat import unset_fake_temporarily
from fusedhead.graph.reasons import Escape
from fusedhead.graph.sizes import same_size
from fusedhead.ir.expr import Expr, Plain
from fusedhead.ir.logits import LOGITS_LIKE, Logits, LogitsLike, LogProbs, Probs, ProbTimes, RowVector
from fusedhead.kernels.transform.transform import Step
from fusedhead.rules.reasons import NoRule
from fusedhead.rules.reductions import prob_times
from fusedhead.rules.table import Context, needs_logits, register_coverage, rule, vocab_size

aten = torch.ops.aten
register_coverage(
    __name__,
    "on the logits",
    "cast, bias, scale (constant, learned, per class, per token), tanh and sigmoid caps, masks of classes; the same in "
    "place where no other name sees it; part of the classes written to, `z[:, k] += c`",
    "writes that another name sees; classes that are set to NaN",
)
COMPUTED = (torch.float32, torch.bfloat16, torch.float16)


@rule(
    aten.to.dtype,
    aten._to_copy.default,
    aten.to.dtype_layout,
    aten.to.device,
    aten.to.other,
    aten.type_as.default,
)
def cast(context: Context, value: Any, *_: Any, **__: Any) -> LogitsLike:
    if context.val.dtype not in COMPUTED:
        raise Escape(NoRule.CAST, dtype=context.val.dtype)
    if isinstance(value, (LogProbs, Probs, ProbTimes)) and context.val.device == value.val.device:
        return replace(value, val=context.val)
    logits = needs_logits(value, "a cast")
    if context.val.device != logits.val.device:
        raise Escape(NoRule.MOVED_TO_DEVICE, device=logits.val.device, other=context.val.device)
    if context.val.dtype == logits.val.dtype:
        return replace(logits, val=context.val)
    return logits.step(context.val)


def extent(operand: Tensor, logits: Logits) -> tuple[bool, bool]:
    """Whether an operand that broadcasts to the logits varies (along the vocabulary, along the tokens)."""
    shape = [1] * (logits.val.ndim - operand.ndim) + list(operand.shape)
    varies = [not same_size(size, 1) for size in shape]
    return varies[logits.class_dim], any(v for d, v in enumerate(varies) if d != logits.class_dim)


def vector(operand: Plain, logits: Logits, what: str) -> tuple[str, Plain | RowVector]:
    """("col" or "row", the vector) of an operand that broadcasts to the logits; one number for all goes by tokens."""
    along_vocab, along_tokens = extent(operand.val, logits)
    if along_vocab and along_tokens:
        raise Escape(NoRule.VARIES_BOTH_WAYS, op=what)
    if along_vocab:
        return "col", Plain(Expr(aten.reshape.default, (operand.ref, [-1])), operand.val.reshape(-1))
    return "row", RowVector(operand, len(logits.row_steps), logits.val, logits.class_dim)


def needs_same_shape(context: Context, logits: Logits, operand: Tensor, how: str) -> None:
    same_shape = len(context.val.shape) == logits.val.ndim and all(
        same_size(a, b) for a, b in zip(context.val.shape, logits.val.shape)
    )
    if not same_shape or not operand.is_floating_point():
        raise Escape(NoRule.BROADCASTS_LOGITS, op=how, dtype=operand.dtype)


def combine(context: Context, logits: Logits, operand: Any, how: str) -> Logits:
    """The logits after ``z how operand`` with ``how`` in {"mul", "add"} and an operand of any allowed extent."""
    if isinstance(operand, (int, float)) and not isinstance(operand, bool):
        return logits.step(context.val, Step(how, float(operand)))
    if not isinstance(operand, Plain) or not isinstance(operand.val, Tensor):
        raise Escape(NoRule.UNKNOWN_NUMBER)
    needs_same_shape(context, logits, operand.val, how)
    kind, operand_vector = vector(operand, logits, how)
    if isinstance(operand_vector, RowVector):
        return logits.step(context.val, Step(f"{how}{kind}", len(logits.rows)), rows=(*logits.rows, operand_vector))
    return logits.step(context.val, Step(f"{how}{kind}", len(logits.cols)), cols=(*logits.cols, operand_vector))


def inverse(operand: Any) -> Any:
    """1 / operand, in float32 where it is a tensor."""
    if isinstance(operand, (int, float)) and operand != 0:
        return 1.0 / operand
    if isinstance(operand, Plain) and isinstance(operand.val, Tensor) and operand.val.is_floating_point():
        wide = Expr(aten.to.dtype, (operand.ref, torch.float32))
        return Plain(Expr(aten.reciprocal.default, (wide,)), operand.val.float())
    raise Escape(NoRule.DIVISOR)


def negative(operand: Any) -> Any:
    if isinstance(operand, (int, float)):
        return -operand
    if isinstance(operand, Plain) and isinstance(operand.val, Tensor):
        return Plain(Expr(aten.neg.default, (operand.ref,)), operand.val)
    raise Escape(NoRule.SUBTRACTED_FROM_LOGITS)


@rule(aten.mul.Tensor, aten.mul.Scalar, aten.multiply.Tensor, aten.multiply.Scalar)
def mul(context: Context, a: Any, b: Any) -> LogitsLike:
    product = prob_times(context, a, b)
    if product is not None:
        return product
    if not isinstance(a, LOGITS_LIKE):
        a, b = b, a
    if isinstance(a, (LogProbs, Probs, ProbTimes)) and isinstance(b, (int, float)):
        return replace(a, val=context.val, factor=a.factor * b)
    return combine(context, needs_logits(a, "mul"), b, "mul")


@rule(aten.div.Tensor, aten.div.Scalar, aten.divide.Tensor, aten.true_divide.Tensor)
def div(context: Context, a: Any, b: Any) -> Logits | LogProbs:
    if isinstance(a, LogProbs) and isinstance(b, (int, float)) and b != 0:
        return replace(a, val=context.val, factor=a.factor / b)
    return combine(context, needs_logits(a, "div"), inverse(b), "mul")


@rule(aten.add.Tensor, aten.add.Scalar)
def add_operand(context: Context, a: Any, b: Any, *, alpha: float = 1) -> Logits:
    if alpha != 1:
        raise Escape(NoRule.ADD_ALPHA, alpha=alpha)
    if not isinstance(a, (Logits, LogProbs)):
        a, b = b, a
    return combine(context, needs_logits(a, "add"), b, "add")


@rule(aten.sub.Tensor, aten.sub.Scalar, aten.subtract.Tensor)
def sub(context: Context, a: Any, b: Any, *, alpha: float = 1) -> Logits:
    if alpha != 1:
        raise Escape(NoRule.SUB_ALPHA, alpha=alpha)
    return combine(context, needs_logits(a, "sub"), negative(b), "add")


@rule(aten.rsub.Scalar, aten.rsub.Tensor)
def rsub(context: Context, a: Any, b: Any, *, alpha: float = 1) -> Logits:
    if alpha != 1:
        raise Escape(NoRule.RSUB_ALPHA, alpha=alpha)
    flipped = needs_logits(a, "rsub").step(a.val, Step("mul", -1.0))
    return combine(context, flipped, b, "add")


@rule(aten.neg.default, aten.negative.default)
def neg(context: Context, value: Any) -> LogitsLike:
    if isinstance(value, (LogProbs, Probs, ProbTimes)):
        return replace(value, val=context.val, factor=-value.factor)
    return needs_logits(value, "neg").step(context.val, Step("mul", -1.0))


@rule(aten.tanh.default, aten.sigmoid.default)
def cap(context: Context, value: Any) -> Logits:
    """An op that is one step of the transform by itself."""
    return needs_logits(value, context.name).step(context.val, Step(context.name))


def column_mask(mask: Any, logits: Logits) -> Plain:
    """A mask that is equal for all tokens, as a vector [V]."""
    if not isinstance(mask, Plain) or not isinstance(mask.val, Tensor) or mask.val.dtype != torch.bool:
        raise Escape(NoRule.MASK_OF_LOGITS)
    along_vocab, along_tokens = extent(mask.val, logits)
    if along_tokens or not along_vocab:
        raise Escape(NoRule.MASK_BY_TOKEN)
    return Plain(Expr(aten.reshape.default, (mask.ref, [-1])), mask.val.reshape(-1))


def put(context: Context, logits: Logits, mask: Any, number: Any) -> Logits:
    """The logits with ``number`` where ``mask`` is True."""
    if isinstance(number, Plain):
        raise Escape(NoRule.UNKNOWN_FILL)
    if context.val.dtype != logits.val.dtype or context.val.ndim != logits.val.ndim:
        raise Escape(NoRule.MASK_CHANGES_LOGITS)
    column = column_mask(mask, logits)
    with unset_fake_temporarily():
        number = float(torch.tensor(number, dtype=logits.val.dtype))  # as the program rounds it
    if math.isnan(number):
        raise Escape(NoRule.FILL_NAN)
    if number == -math.inf:  # the common mask: exponentials are zero by themselves
        dropped = Plain(Expr(aten.to.dtype, (column.ref, torch.float32)), column.val.float())
        return logits.step(context.val, Step("dropcol", len(logits.cols)), cols=(*logits.cols, dropped))
    like = {"dtype": torch.float32, "device": column.val.device}
    kept = Expr(aten.full.default, ([vocab_size(logits)], math.nan), like)
    filled = Plain(Expr(aten.masked_fill.Scalar, (kept, column, number)), column.val.float())
    return logits.step(context.val, Step("setcol", len(logits.cols)), cols=(*logits.cols, filled))


@rule(aten.masked_fill.Scalar)
def masked_fill(context: Context, value: Any, mask: Any, number: Any) -> Logits:
    return put(context, needs_logits(value, "masked_fill"), mask, number)


@rule(aten.where.ScalarOther)
def where_else(context: Context, mask: Any, value: Any, number: Any) -> Logits:
    if not isinstance(mask, Plain):
        raise Escape(NoRule.MASK_OF_LOGITS)
    other = Plain(Expr(aten.logical_not.default, (mask.ref,)), mask.val)
    return put(context, needs_logits(value, "where"), other, number)


@rule(aten.where.ScalarSelf)
def where_not(context: Context, mask: Any, number: Any, value: Any) -> Logits:
    return put(context, needs_logits(value, "where"), mask, number)
