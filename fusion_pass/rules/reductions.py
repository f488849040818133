"""Reductions over the classes: sums, moments of log p in all spellings, and the decisions argmax and max.

With p = softmax(z):  Σ p log p = -H,  Σ p z = lse - H,  Σ p (log p)² = variance + H². argmax and max are
computed on the logits as the program rounds them, with the first index on ties, as in eager code: a rounding can change
which class is the largest.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from fusedhead.graph.nodes import name_of
from fusedhead.graph.reasons import Escape
from fusedhead.ir.builder import Emit
from fusedhead.ir.logits import Logits, LogProbs, Probs, ProbTimes, logits_of, same_logits
from fusedhead.ir.lse_differences import SPREAD, spread
from fusedhead.ir.terminal import Kind, Statistics, Terminal
from fusedhead.rules.gather import per_row
from fusedhead.rules.reasons import NoRule
from fusedhead.rules.table import Context, needs_logits, over_classes, register_coverage, rule, vocab_size

aten = torch.ops.aten
register_coverage(
    __name__,
    "beside the loss",
    "entropy and variance of log p in their spellings, sums over the classes, argmax and max as eager code rounds",
    "",
)


@rule(aten.softmax.int, aten._softmax.default, aten.special_softmax.default)
def probabilities(context: Context, value: Any, dim: int, dtype: Any = None, **_: Any) -> Probs:
    logits = needs_logits(value, "softmax")
    over_classes(dim, logits, "softmax")
    return Probs(logits, context.val)


def prob_times(context: Context, a: Any, b: Any) -> ProbTimes | None:
    """p · log p, p · z, (log p)² or p · (log p)², if that is what a product is."""
    factors = [factor_of(x) for x in (a, b)]
    weights, powers = (sum(x[at] for x in factors if x) for at in (0, 1))
    logs = [x[2] for x in factors if x and x[1]]
    if None in factors or weights > 1 or powers > (2 if all(logs) else 1) or weights + powers < 2:
        return None
    of, other = logits_of(a), logits_of(b)
    if not same_logits(of, other) or of.detached != other.detached:
        raise Escape(NoRule.PRODUCT_OF_OTHERS)
    factor = getattr(a, "factor", 1.0) * getattr(b, "factor", 1.0)
    return ProbTimes(of, context.val, all(logs), factor, powers, bool(weights))


def factor_of(value: Any) -> tuple[int, int, bool] | None:
    """The powers in a factor: (of p, of log p or the logits, whether the second is log p); None for another factor."""
    if isinstance(value, ProbTimes):
        return int(value.weighted), value.power, value.log
    kinds: dict[type, tuple[int, int, bool]] = {Probs: (1, 0, True), LogProbs: (0, 1, True), Logits: (0, 1, False)}
    return kinds.get(type(value))


def squared(context: Context, value: LogProbs) -> ProbTimes:
    """(log p)², by an op that squares."""
    return ProbTimes(value.of, context.val, True, value.factor**2, 2, weighted=False)


def sum_of_prob_times(context: Context, value: ProbTimes, keepdim: bool) -> Terminal:
    """The entropy, or a function of it, as a sum of `ProbTimes` over the classes."""
    logits = value.of
    if value.power == 2:
        return second_moment(context, value, keepdim)

    def result(emit: Emit, stats: Statistics) -> Node:
        if value.log:
            out = emit(aten.mul.Tensor, stats.by_name["entropy"], -value.factor)
        else:
            out = emit(aten.mul.Tensor, emit(aten.sub.Tensor, stats.lse, stats.by_name["entropy"]), value.factor)
        return per_row(emit, out, stats, logits.class_dim, keepdim)

    return Terminal(logits, context.val, Kind.ENTROPY, "entropy", frozenset({"entropy"}), result)


def second_moment(context: Context, value: ProbTimes, keepdim: bool) -> Terminal:
    """Σ p (log p)² = variance + entropy². Min-K%++ subtracts (Σ p log p)² from it."""
    logits = value.of

    def result(emit: Emit, stats: Statistics) -> Node:
        square = emit(aten.mul.Tensor, stats.by_name["entropy"], stats.by_name["entropy"])
        out = emit(aten.mul.Tensor, emit(aten.add.Tensor, stats.by_name["variance"], square), value.factor)
        return per_row(emit, out, stats, logits.class_dim, keepdim)

    want = frozenset({"entropy", "variance"})
    return Terminal(logits, context.val, Kind.ENTROPY, "second moment of log p", want, result)


def argmax_of(context: Context, logits: Logits, keepdim: bool, val: Any) -> Terminal:
    def result(emit: Emit, stats: Statistics) -> Node:
        return per_row(emit, stats.by_name["argmax"], stats, logits.class_dim, keepdim)

    return Terminal(logits, val, Kind.ARGMAX, "argmax", frozenset({"argmax"}), result)


@rule(aten.argmax.default)
def argmax(context: Context, value: Any, dim: int | None = None, keepdim: bool = False) -> Terminal:
    if isinstance(value, LogProbs) and value.val.dtype == torch.float32 and value.factor > 0:
        value = value.of  # z - lse in float32 orders the classes as z does, up to the rounding of z itself
    if isinstance(value, (LogProbs, Probs)):
        # rounded to a low precision, different logits may have equal (log-)probabilities
        raise Escape(NoRule.ARGMAX_OF_PROBABILITIES)
    logits = needs_logits(value, "argmax")
    if dim is None:
        raise Escape(NoRule.ARGMAX_OF_ALL)
    over_classes(dim, logits, "argmax")
    return argmax_of(context, logits, keepdim, context.val)


def only_the_index(node: Node) -> bool:
    """Whether ``z.max(dim)`` is asked for its second result alone, which has no gradient."""
    return name_of(node) == "max" and all(name_of(use) == "getitem" and use.args[1] == 1 for use in node.users)


@rule(aten.max.dim)
def max_dim(context: Context, value: Any, dim: int, keepdim: bool = False) -> list[Terminal]:
    logits = needs_logits(value, "max")
    over_classes(dim, logits, "max")
    if not logits.has_no_gradient and context.val[0].requires_grad and not only_the_index(context.node):
        raise Escape(NoRule.GRADIENT_OF_MAX)

    def result(emit: Emit, stats: Statistics) -> Node:
        return per_row(emit, stats.by_name["max"], stats, logits.class_dim, keepdim)

    largest = Terminal(logits, context.val[0], Kind.MAX, "max", frozenset({"max"}), result)
    return [largest, argmax_of(context, logits, keepdim, context.val[1])]


@rule(aten.sum.dim_IntList, aten.sum.default, aten.mean.dim, aten.mean.default)
def summed(context: Context, value: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Terminal:
    """A sum or mean over the classes or over everything: of logits, log-probabilities (Σ z - V lse), entropy terms."""
    name, mean = context.name, context.name == "mean"
    dims = [dim] if isinstance(dim, int) else list(dim or [])
    logits = value if isinstance(value, Logits) else getattr(value, "of", None)
    alone = len(dims) == 1 and logits is not None and dims[0] % value.val.ndim == logits.class_dim
    if logits is None or not (alone or not dims):
        raise Escape(NoRule.SUM_DIMS, op=name)
    if isinstance(value, ProbTimes) and value.weighted and alone and not mean:
        return sum_of_prob_times(context, value, keepdim)
    if not isinstance(value, (Logits, LogProbs)):
        raise Escape(NoRule.SUM_OF_PROBABILITIES, op=name)
    size = vocab_size(logits)

    def result(emit: Emit, stats: Statistics) -> Node:
        assert stats.sum is not None
        out = stats.sum
        if isinstance(value, LogProbs):
            out = emit(aten.mul.Tensor, spread(emit, stats, float(size)), -value.factor)
        out = emit(aten.mul.Tensor, out, 1.0 / size) if mean else out
        if not alone:  # over the tokens too
            return emit(aten.mean.default if mean else aten.sum.default, out)
        return per_row(emit, out, stats, logits.class_dim, keepdim)

    what = "log_softmax + " if isinstance(value, LogProbs) else ""
    over = "classes" if alone else "everything"
    want = SPREAD if isinstance(value, LogProbs) else frozenset({"sum"})
    return Terminal(logits, context.val, Kind.SUM, f"{what}{name} over {over}", want, result)
