"""Projections: every op that multiplies hidden states by a two-dimensional weight starts logits.

Each rule names the hidden states, the weight as [V, D] (a transposing view where the program holds it as
[D, V]) and an optional bias. Whether the product is a head depends on its uses and is decided later.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from fusedhead.compat import enter_autocast
from fusedhead.graph.op_names import equation_terms
from fusedhead.graph.reasons import Escape
from fusedhead.ir.expr import Expr, Plain
from fusedhead.ir.logits import Logits, Projection, RowStep
from fusedhead.kernels.transform.transform import Step
from fusedhead.rules.reasons import NoRule
from fusedhead.rules.table import Context, register_coverage, rule

aten = torch.ops.aten
register_coverage(
    __name__,
    "projection",
    "hidden states `[N, D]`, `[B, T, D]`, frozen or not, and any weight of the graph: tied, transposed, cast, sliced; "
    "with or without bias; float32, bfloat16, float16",
    "weights that are not `[V, D]`; float64 and integer products",
)


def project(context: Context, hidden: Plain, weight: Plain, class_dim: int | None = None) -> Logits:
    """The logits of ``hidden [..., D] @ weight [V, D].T``, or an escape saying why this is no head."""
    for name, operand in (("hidden states", hidden), ("weight", weight)):
        if not isinstance(operand, Plain):
            raise Escape(NoRule.OPERAND_IS_LOGITS, what=name)
    if weight.val.ndim != 2:
        raise Escape(NoRule.WEIGHT_DIMS, count=weight.val.ndim)
    dtype = context.val.dtype
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise Escape(NoRule.PROJECTION_DTYPE, dtype=dtype)
    if any(not isinstance(size, int) for size in weight.val.shape):
        raise Escape(NoRule.WEIGHT_SYMBOLIC)
    if weight.val.shape[0] == 0:
        raise Escape(NoRule.NO_CLASSES)
    same_dtype(context, hidden, weight)
    head = Projection(context.node, hidden, weight, dtype)
    last = context.val.ndim - 1
    moved = () if class_dim in (None, last) else (RowStep(aten.movedim.int, (last, class_dim), keeps_order=True),)
    start = Logits(head, context.val, last if class_dim is None else class_dim, row_steps=moved)
    return start.step(context.val)


def same_dtype(context: Context, *operands: Plain) -> None:
    """Raise Escape where operands differ in dtype and autocast casts neither: eager code raises there too."""
    if all(operand.val.dtype == context.val.dtype for operand in operands):
        return
    regions = context.node.graph.find_nodes(op="call_function", target=enter_autocast)
    if not any(True for _ in regions) and not torch.is_autocast_enabled(context.val.device.type):
        shown = ", ".join(str(operand.val.dtype) for operand in operands)
        raise Escape(NoRule.OPERAND_DTYPES, dtypes=shown, dtype=context.val.dtype)


def transposed(weight: Plain) -> Plain:
    """The [V, D] view of a weight held as [D, V]."""
    if not isinstance(weight, Plain) or weight.val.ndim != 2:
        raise Escape(NoRule.SECOND_OPERAND)
    return Plain(Expr(aten.t.default, (weight.ref,)), weight.val.t())


def with_bias(context: Context, logits: Logits, bias: Plain | None) -> Logits:
    """Add a bias before the rounding of the projection: ``addmm`` and ``linear`` round once."""
    if bias is None:
        return logits
    if not isinstance(bias, Plain) or bias.val.ndim > 2 or (bias.val.ndim == 2 and bias.val.shape[0] != 1):
        raise Escape(NoRule.BIAS_BY_TOKEN)
    if bias.val.shape[-1:] != logits.val.shape[-1:]:
        raise Escape(NoRule.BIAS_SHAPE)
    same_dtype(context, bias)
    flat = Plain(Expr(aten.reshape.default, (bias.ref, [-1])), bias.val.reshape(-1))
    return replace(logits, steps=(), cols=(flat,)).step(logits.val, Step("addcol", 0))


@rule(aten.linear.default)
def linear(context: Context, hidden: Plain, weight: Plain, bias: Plain | None = None) -> Logits:
    return with_bias(context, project(context, hidden, weight), bias)


@rule(aten.matmul.default, aten.mm.default)
def matmul(context: Context, hidden: Plain, weight: Plain) -> Logits:
    return project(context, hidden, transposed(weight))


@rule(aten.addmm.default)
def addmm(context: Context, bias: Plain, hidden: Plain, weight: Plain, *, beta: float = 1, alpha: float = 1) -> Logits:
    if beta != 1 or alpha != 1:
        raise Escape(NoRule.ADDMM_FACTORS, beta=beta, alpha=alpha)
    return with_bias(context, project(context, hidden, transposed(weight)), bias)


@rule(aten.einsum.default)
def einsum(context: Context, equation: str, operands: list[Plain], path: object = None) -> Logits:
    """``...d,vd->...v`` in any letters, with the operands and the weight's dimensions in either order."""
    terms, out = equation_terms(equation)
    if len(terms) != 2 or not out or len(operands) != 2:
        raise Escape(NoRule.EINSUM_NO_PROJECTION, equation=equation)
    for (hidden, h), (weight, w) in (zip(operands, terms), zip(operands[::-1], terms[::-1])):
        shared = [letter for letter in w if letter in h]
        letters = h.replace("...", "")
        if len(w) != 2 or len(set(w)) != 2 or len(shared) != 1 or len(set(letters)) != len(letters):
            continue
        hidden_letter = shared[0]
        class_letter = w.replace(hidden_letter, "")
        rows = h.replace(hidden_letter, "")
        if sorted(out.replace(".", "")) != sorted((rows + class_letter).replace(".", "")):
            continue
        if out.replace(class_letter, "") != rows:
            raise Escape(NoRule.EINSUM_PERMUTES_ROWS, equation=equation)
        if not h.endswith(hidden_letter):
            raise Escape(NoRule.EINSUM_HIDDEN_DIM, equation=equation)
        if "." in out and not out.endswith(class_letter):
            raise Escape(NoRule.EINSUM_VOCABULARY_DIM, equation=equation)
        stored = weight if w == class_letter + hidden_letter else transposed(weight)
        class_dim = context.val.ndim - 1 if out.endswith(class_letter) else out.index(class_letter)
        return project(context, hidden, stored, class_dim)
    raise Escape(NoRule.EINSUM_WEIGHT, equation=equation)
