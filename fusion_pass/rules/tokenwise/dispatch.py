"""Reads an op token by token: its form on [N, ...] by the rules of `TOKEN_RULES`, or by its decomposition.

An op qualifies if its result for a token depends on that token's operands only. Ops that torch tags as pointwise do and
need no rule. Composite ops are decomposed. A rule gives the op's own numbers, because it runs the op itself on fewer
rows.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import make_fx

from fusedhead.compat import (
    OpOverload,
    decomposition_table,
    has_kernel_for_key,
    maybe_get_fake_mode,
    tree_leaves,
    tree_map,
)
from fusedhead.graph.reasons import Escape
from fusedhead.ir.expr import Expr, Plain
from fusedhead.ir.logits import LOGITS_LIKE, Logits, LogitsLike, LogProbs, Probs, ProbTimes, StackedProjection
from fusedhead.ir.tokenwise import HeadInput, MaskedRows, TokenValue, token_values_of
from fusedhead.rules.table import TOKEN_RULES, Context, register_coverage
from fusedhead.rules.tokenwise import indexing, losses, reductions, views  # noqa: F401  register their rules
from fusedhead.rules.tokenwise.elementwise import DTYPE_OPS, as_wide, entrywise, is_pointwise, pointwise_tokens
from fusedhead.rules.tokenwise.reasons import NotByTokens

aten = torch.ops.aten

register_coverage(
    __name__,
    "anything else, token by token",
    "the program's own ops on some tokens at a time, with their gradients or again in the backward: targets that are "
    "probabilities, KL between heads, adapters (LoRA) on a head, margins, mixtures, every pointwise op",
    "ops that run over tokens, or mix tokens and classes",
)
# losses that are pointwise up to their reduction, read through torch's decomposition
BY_PARTS = frozenset(
    {aten.mse_loss.default, aten.smooth_l1_loss.default, aten.huber_loss.default, aten.soft_margin_loss.default}
)  # fmt: skip


def read_by_tokens(context: Context, *args: Any, **kwargs: Any) -> Any:
    """The result of an op on values that come from logits. Raises Escape for an op that mixes tokens."""
    op = context.op
    if not isinstance(op, OpOverload) or op._schema.is_mutable:
        raise Escape(NotByTokens.NO_NEW_TENSOR, op=op)
    args, kwargs = tree_map(token_value, (args, kwargs), is_leaf=lambda x: isinstance(x, LOGITS_LIKE))
    wanted, alone = first_dtype(context.val), first_dtype(context.alone)
    if wanted != alone and wanted is not None and alone is not None and wanted.itemsize > alone.itemsize:
        args, kwargs = tree_map(lambda x: widened(x, wanted), (args, kwargs))
    elif wanted != alone and op not in DTYPE_OPS:
        raise Escape(NotByTokens.AUTOCAST, op=op, dtype=wanted)
    if op is not aten.sum.default and any(isinstance(x, MaskedRows) for x in tree_leaves((args, kwargs))):
        raise Escape(NotByTokens.MASKED, op=op)
    for rule in TOKEN_RULES.get(op, ()):
        positionals, named = (args, kwargs) if rule.dim is None else positional(op, args, kwargs, rule.dim)
        value = rule.read(replace(context, dim=rule.dim), *positionals, **named)
        if value is not None:
            return value
    if op not in TOKEN_RULES and is_pointwise(op):
        return pointwise_tokens(context, *args, **kwargs)
    if op in BY_PARTS:
        return taken_apart(decomposition_table[op], context, args, kwargs)
    if not is_composite(op):
        raise Escape(NotByTokens.UNKNOWN_OP, op=op)
    return taken_apart(op, context, args, kwargs)


def positional(op: Any, args: tuple, kwargs: dict[str, Any], last: int) -> tuple[tuple, dict[str, Any]]:
    """The arguments of a call with those up to number ``last`` in their places, defaults where none is given."""
    missing = op._schema.arguments[len(args) : last + 1]
    filled = (*args, *(kwargs.get(argument.name, argument.default_value) for argument in missing))
    moved = {argument.name for argument in missing}
    return filled, {name: value for name, value in kwargs.items() if name not in moved}


def is_composite(op: Any) -> bool:
    """Whether an overload is composed of others. One that the dispatcher does not know (``aten::size``) is not."""
    try:
        return has_kernel_for_key(op.name(), "CompositeImplicitAutograd")
    except RuntimeError:
        return False


def first_dtype(val: Any) -> torch.dtype | None:
    return next((v.dtype for v in tree_leaves(val) if isinstance(v, Tensor) and v.is_floating_point()), None)


def widened(x: Any, dtype: torch.dtype) -> Any:
    """An operand cast as autocast casts it for an op that runs in a wider dtype."""
    if not isinstance(x, (TokenValue, Plain)) or not isinstance(x.val, Tensor) or not x.val.is_floating_point():
        return x
    if x.val.dtype == dtype:
        return x
    val = x.val.to(dtype)
    if isinstance(x, Plain):
        return Plain(Expr(aten.to.dtype, (x, dtype)), val)
    return TokenValue(Expr(aten.to.dtype, (x.expr, dtype)), val, x.tail, x.heads)


def token_value(value: Any) -> Any:
    """Logits, or probabilities of them, as a token value; any other value unchanged."""
    if not isinstance(value, LOGITS_LIKE):
        return value
    logits = value if isinstance(value, Logits) else value.of
    if isinstance(logits.head, StackedProjection):
        raise Escape(NotByTokens.STACKED)
    tail = tuple(d == logits.class_dim for d in range(logits.val.ndim))
    expr = expression(value, HeadInput(logits), value.val.dtype)
    return TokenValue(expr, value.val, tail, frozenset({logits.head}))


def expression(value: LogitsLike, head: HeadInput, dtype: torch.dtype) -> HeadInput | Expr:
    """The expression that defines a value on the logits of its head."""
    if isinstance(value, Logits):
        return head
    scaled = lambda x: x if value.factor == 1 else Expr(aten.mul.Tensor, (x, value.factor))  # noqa: E731
    if isinstance(value, (LogProbs, Probs)):
        op = aten.log_softmax.int if isinstance(value, LogProbs) else aten.softmax.int
        return scaled(Expr(op, (head, 1, dtype)))
    assert isinstance(value, ProbTimes)
    x = Expr(aten.log_softmax.int, (head, 1, dtype)) if value.log else head
    x = Expr(aten.mul.Tensor, (x, x)) if value.power == 2 else x
    return scaled(Expr(aten.mul.Tensor, (Expr(aten.softmax.int, (head, 1, dtype)), x)) if value.weighted else x)


def taken_apart(parts: Callable[..., Any], context: Context, args: tuple, kwargs: dict[str, Any]) -> Any:
    """The result of a composite op, read through the ops that ``parts`` runs."""
    target = context.op
    leaves = [x for x in tree_leaves((args, kwargs)) if isinstance(x, (TokenValue, Plain))]
    mode = next((m for m in (maybe_get_fake_mode(x.val) for x in leaves if isinstance(x.val, Tensor)) if m), None)
    assert mode is not None

    def call(*values: Any) -> Any:
        value_of = dict(zip(map(id, leaves), values))
        inputs, named = tree_map(lambda x: value_of.get(id(x), x), (args, kwargs))
        return parts(*inputs, **named)

    with mode, torch.no_grad(), torch.autocast(leaves[0].val.device.type, enabled=False):
        graph = make_fx(call)(*(x.val for x in leaves)).graph
    env: dict[Node, Any] = dict(zip((n for n in graph.nodes if n.op == "placeholder"), leaves))
    for node in graph.nodes:
        if node.op == "output":
            return tree_map(lambda n: env[n] if isinstance(n, Node) else n, node.args[0])
        if node.op != "call_function":
            if node.op == "get_attr":
                raise Escape(NotByTokens.HOLDS_A_CONSTANT, op=target)
            continue
        inputs, named = tree_map(lambda n: env[n] if isinstance(n, Node) else n, (tuple(node.args), dict(node.kwargs)))
        val = node.meta.get("val")
        each = Context(context.node, val, node.target, alone=val)
        if node.target is operator.getitem:
            if not isinstance(inputs[0], (list, tuple)):
                raise Escape(NotByTokens.ONE_OF_SEVERAL, op=target)
            env[node] = inputs[0][inputs[1]]
        elif any(isinstance(x, TokenValue) for x in tree_leaves((inputs, named))):
            if node.target is target:
                raise Escape(NotByTokens.UNKNOWN_OP, op=target)
            plain = (x for x in tree_leaves((inputs, named)) if isinstance(x, Plain))
            if any(True for x in plain for _ in token_values_of(x)):
                raise Escape(NotByTokens.WITH_A_TOTAL, op=target)
            env[node] = read_by_tokens(each, *inputs, **named)
        elif is_pointwise(node.target) and (like := as_wide(val, leaves)) is not None:
            env[node] = entrywise(each, inputs, named, like.tail, like.heads)
        else:
            env[node] = Plain(Expr(node.target, inputs, named), val)
    raise AssertionError("a traced graph has an output")
