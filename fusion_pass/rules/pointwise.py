"""Elementwise functions of the logits: code is generated from the op and becomes one step.

An op without generated code (`pointwise_codegen` raises the reason), or whose second operand wants a gradient, is
computed token by token like any other op. So are functions that jump (floor, sign, comparisons), since the program's
rounding decides on which side of a jump a logit is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedhead.graph.reasons import Escape
from fusedhead.ir.expr import Plain
from fusedhead.ir.logits import LOGITS_LIKE, Logits, LogProbs, Probs, ProbTimes, RowVector
from fusedhead.kernels.transform.transform import Step
from fusedhead.rules.elementwise import COMPUTED, needs_same_shape, vector
from fusedhead.rules.pointwise_codegen import function_of
from fusedhead.rules.reasons import NoRule
from fusedhead.rules.reductions import squared
from fusedhead.rules.table import Context, needs_logits, register_coverage, rule

aten = torch.ops.aten
register_coverage(
    __name__,
    "through functions",
    "any function of each logit, with constants and with vectors along the classes or the tokens; its derivative comes "
    "from autograd's own formula",
    "",
)


def generated(context: Context, *args: Any, **kwargs: Any) -> Logits:
    """The logits after a function of which one argument is the logits."""
    name = context.name
    constants = [a for a in (*args, *kwargs.values()) if not isinstance(a, (Plain, *LOGITS_LIKE))]
    if any(a is not None and not isinstance(a, (bool, int, float, str)) for a in constants):
        raise Escape(NoRule.UNKNOWN_ARGUMENT, op=name)
    at = [i for i, a in enumerate(args) if isinstance(a, LOGITS_LIKE)]
    if len(at) != 1:
        raise Escape(NoRule.LOGITS_WITH_LOGITS, op=name)
    logits = needs_logits(args[at[0]], name)
    cols, rows, words = logits.cols, logits.rows, list(args)
    words[at[0]] = "z"
    for i, operand in enumerate(args):
        if not isinstance(operand, Plain):
            continue
        if not isinstance(operand.val, Tensor) or operand.val.requires_grad:
            raise Escape(NoRule.TRAINED_OPERAND, op=name)
        needs_same_shape(context, logits, operand.val, name)
        kind, operand_vector = vector(operand, logits, name)
        words[i] = f"{kind[0]}{len(cols if kind == 'col' else rows)}"
        if isinstance(operand_vector, RowVector):
            rows = (*rows, operand_vector)
        else:
            cols = (*cols, operand_vector)
    if context.val.dtype not in (*COMPUTED, logits.val.dtype):
        raise Escape(NoRule.FUNCTION_DTYPE, op=name, dtype=context.val.dtype)
    function = function_of(context.op, tuple(words), tuple(sorted(kwargs.items())), at[0])
    return logits.step(context.val, Step("fn", function.text), cols=cols, rows=rows)


@rule(aten.exp.default)
def exponential(context: Context, value: Any) -> Logits | Probs:
    if isinstance(value, LogProbs) and value.factor == 1.0:
        return Probs(value.of, context.val)
    return generated(context, value)


@rule(aten.square.default)
def square(context: Context, value: Any) -> Logits | ProbTimes:
    return squared(context, value) if isinstance(value, LogProbs) else generated(context, value)


@rule(aten.pow.Tensor_Scalar)
def power(context: Context, value: Any, exponent: Any) -> Logits | ProbTimes:
    if isinstance(value, LogProbs) and exponent == 2:
        return squared(context, value)
    return generated(context, value, exponent)


LISTED = (
    (
        aten.abs.default, aten.sqrt.default, aten.rsqrt.default, aten.reciprocal.default,
        aten.exp2.default, aten.expm1.default, aten.log.default, aten.log2.default,
        aten.log1p.default, aten.sin.default, aten.cos.default, aten.erf.default, aten.special_erf.default,
    ),
    (
        aten.relu.default, aten.relu6.default, aten.leaky_relu.default, aten.elu.default, aten.celu.default,
        aten.selu.default, aten.silu.default, aten.gelu.default, aten.mish.default, aten.softplus.default,
        aten.log_sigmoid.default, aten.hardtanh.default, aten.hardsigmoid.default, aten.hardswish.default,
        aten.threshold.default,
    ),
    (
        aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default, aten.clamp.Tensor, aten.clamp_min.Tensor,
        aten.clamp_max.Tensor, aten.clip.default, aten.maximum.default, aten.minimum.default, aten.logaddexp.default,
    ),
)  # fmt: skip
for _table in LISTED:
    rule(*_table)(generated)
