"""Which ATen ops treat every token apart, and their form on [N, ...]: the rules behind row programs.

An op qualifies if its result for a token depends on that token's operands only. Pointwise ops are told by their
tag, the others stand in tables with the place of their dimension argument. A composite op is taken apart first.
Every rule gives the same numbers as the op itself, because it is the op itself, on fewer rows.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
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
from fusedhead.ir.logits import (
    FOLLOWED,
    Call,
    Escape,
    Expected,
    Followed,
    Logits,
    LogProbs,
    Plain,
    Probs,
    Stack,
)
from fusedhead.ir.tokenwise import MaskedRows, RowCall, Rowwise, Seed
from fusedhead.ir.tokenwise import parts as parts_of
from fusedhead.rules.table import Family
from fusedhead.rules.tokenwise.indexing import PICKS, masked_rows, picked
from fusedhead.rules.tokenwise.losses import LOSSES, nll
from fusedhead.rules.tokenwise.operands import common_tail, heads_of, lined_up, same
from fusedhead.rules.tokenwise.reductions import (
    ALONG,
    INDEXED,
    REDUCE,
    RESIZE,
    TOTALS,
    VERDICTS,
    along,
    indexed,
    reduced,
    total,
    verdict,
)
from fusedhead.rules.tokenwise.views import CASTS, FILLED, KEPT, LAYOUTS, cast, filled, kept, length, lengths

aten = torch.ops.aten

LISTED = (ALONG, REDUCE, RESIZE)  # overloads that the table of what is fused names
FAMILY = Family(
    "anything else, token by token",
    "the program's own ops on some tokens at a time, with their gradients or again in the backward: targets that are "
    "probabilities, KL between heads, adapters (LoRA) on a head, margins, mixtures, every pointwise op",
    "ops that run over tokens, or mix tokens and classes",
)


def read(target: Any, val: Any, traced: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """What an op makes of rowwise or followed operands. Raises Escape where it does not treat tokens apart.

    ``val`` is the fake result in the program, ``traced`` that of the op alone: they differ where autocast acts.
    """
    if not isinstance(target, OpOverload) or target._schema.is_mutable:
        raise Escape(f"{target} is no op that makes a new tensor")
    args, kwargs = tree_map(rowwise, (args, kwargs), is_leaf=lambda x: isinstance(x, FOLLOWED))
    wanted, made = first_dtype(val), first_dtype(traced)
    if wanted != made and wanted is not None and made is not None and wanted.itemsize > made.itemsize:
        args, kwargs = tree_map(lambda x: widened(x, wanted), (args, kwargs))
    elif wanted != made and target not in CASTS:
        raise Escape(f"{target} gives {wanted} under autocast")
    if target is aten.index.Tensor and (masked := masked_rows(args, kwargs)) is not None:
        x, column = masked
        where = read(aten.where.ScalarOther, x.val, x.val, (column, x, 0.0), {})
        return MaskedRows(where.expr, where.val, where.tail, where.heads, args[1][0])
    if target is not aten.sum.default and any(isinstance(x, MaskedRows) for x in tree_leaves((args, kwargs))):
        raise Escape(f"{target} reads tokens that a mask picks, of which only the sum over everything is read")
    for matches, form in FORMS:
        found = form(target, val, args, kwargs) if matches(target) else NotImplemented
        if found is not NotImplemented:
            return found
    if target in BY_PARTS:
        return taken_apart(decomposition_table[target], target, val, args, kwargs)
    if not is_composite(target):
        raise Escape(f"{target} is not known to treat tokens apart")
    return taken_apart(target, target, val, args, kwargs)


def is_composite(target: Any) -> bool:
    """Whether an overload is made of others; one that the dispatcher does not know (``aten::size``) is not."""
    try:
        return has_kernel_for_key(target.name(), "CompositeImplicitAutograd")
    except RuntimeError:
        return False


def first_dtype(val: Any) -> torch.dtype | None:
    return next((v.dtype for v in tree_leaves(val) if isinstance(v, Tensor) and v.is_floating_point()), None)


def widened(x: Any, dtype: torch.dtype) -> Any:
    """An operand as autocast hands it to an op that runs in a wider dtype."""
    if not isinstance(x, (Rowwise, Plain)) or not isinstance(x.val, Tensor) or not x.val.is_floating_point():
        return x
    if x.val.dtype == dtype:
        return x
    val = x.val.to(dtype)
    if isinstance(x, Plain):
        return Plain(Call(aten.to.dtype, (x, dtype)), val)
    return Rowwise(RowCall(aten.to.dtype, (x.expr, dtype)), val, x.tail, x.heads)


def rowwise(value: Any) -> Any:
    """A followed value as a rowwise one; anything else as it is."""
    if not isinstance(value, FOLLOWED):
        return value
    logits = value if isinstance(value, Logits) else value.of
    if isinstance(logits.head, Stack):
        raise Escape("logits of several heads that are stacked are not computed token by token")
    tail = tuple(d == logits.class_dim for d in range(logits.val.ndim))
    expr = expression(value, Seed(logits), value.val.dtype)
    return Rowwise(expr, value.val, tail, frozenset({logits.head}))


def expression(value: Followed, seed: Seed, dtype: torch.dtype) -> Seed | RowCall:
    if isinstance(value, Logits):
        return seed
    scaled = lambda x: x if value.factor == 1 else RowCall(aten.mul.Tensor, (x, value.factor))  # noqa: E731
    if isinstance(value, (LogProbs, Probs)):
        op = aten.log_softmax.int if isinstance(value, LogProbs) else aten.softmax.int
        return scaled(RowCall(op, (seed, 1, dtype)))
    assert isinstance(value, Expected)
    x = RowCall(aten.log_softmax.int, (seed, 1, dtype)) if value.log else seed
    x = RowCall(aten.mul.Tensor, (x, x)) if value.power == 2 else x
    return scaled(RowCall(aten.mul.Tensor, (RowCall(aten.softmax.int, (seed, 1, dtype)), x)) if value.weighted else x)


def pointwise(target: Any, val: Any, args: tuple, kwargs: dict[str, Any]) -> Rowwise:
    if not isinstance(val, Tensor):
        raise Escape(f"{target} has several results")
    operands = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Rowwise)]
    return entrywise(target, val, args, kwargs, common_tail(val, operands), heads_of(operands))


def entrywise(
    target: Any, val: Any, args: tuple, kwargs: dict[str, Any], tail: tuple[bool, ...], heads: frozenset[Any]
) -> Rowwise:
    """A pointwise op with its operands lined up; none of them need come from the logits."""
    given, named = tree_map(lambda x: lined_up(x, tail, val.shape), (args, kwargs))
    named = {k: v for k, v in named.items() if k not in ("memory_format", "device", "layout", "pin_memory")}
    return Rowwise(RowCall(target, given, named), val, tail, heads)


# losses with a kernel of their own that are pointwise up to their reduction: by torch's decomposition
BY_PARTS = frozenset(
    {aten.mse_loss.default, aten.smooth_l1_loss.default, aten.huber_loss.default, aten.soft_margin_loss.default}
)  # fmt: skip


def taken_apart(parts: Callable[..., Any], target: Any, val: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """A composite op by the ops that ``parts`` makes it of."""
    leaves = [x for x in tree_leaves((args, kwargs)) if isinstance(x, (Rowwise, Plain))]
    mode = next((m for m in (maybe_get_fake_mode(x.val) for x in leaves if isinstance(x.val, Tensor)) if m), None)
    assert mode is not None

    def call(*values: Any) -> Any:
        given = dict(zip(map(id, leaves), values))
        here, named = tree_map(lambda x: given.get(id(x), x), (args, kwargs))
        return parts(*here, **named)

    with mode, torch.no_grad(), torch.autocast(leaves[0].val.device.type, enabled=False):
        graph = make_fx(call)(*(x.val for x in leaves)).graph
    env: dict[Node, Any] = dict(zip((n for n in graph.nodes if n.op == "placeholder"), leaves))
    for node in graph.nodes:
        if node.op == "output":
            return tree_map(lambda n: env[n] if isinstance(n, Node) else n, node.args[0])
        if node.op != "call_function":
            if node.op == "get_attr":
                raise Escape(f"{target} holds a constant tensor")
            continue
        here, named = tree_map(lambda n: env[n] if isinstance(n, Node) else n, (tuple(node.args), dict(node.kwargs)))
        if node.target is operator.getitem:
            if not isinstance(here[0], (list, tuple)):
                raise Escape(f"{target} takes one of several results that do not come from the logits")
            env[node] = here[0][here[1]]
        elif any(isinstance(x, Rowwise) for x in tree_leaves((here, named))):
            if node.target is target:
                raise Escape(f"{target} is not known to treat tokens apart")
            if any(isinstance(x, Plain) and any(True for _ in parts_of(x)) for x in tree_leaves((here, named))):
                raise Escape(f"{target} combines logits with a total over their tokens")
            env[node] = read(node.target, node.meta["val"], node.meta["val"], here, named)
        elif is_pointwise(node.target) and (like := as_wide(node.meta["val"], leaves)) is not None:
            env[node] = entrywise(node.target, node.meta["val"], here, named, like.tail, like.heads)
        else:
            env[node] = Plain(Call(node.target, here, named), node.meta["val"])
    raise AssertionError("a traced graph has an output")


def as_wide(val: Any, operands: list[Any]) -> Rowwise | None:
    """What comes from the logits among operands and is of the shape of ``val``."""
    wide = (x for x in operands if isinstance(x, Rowwise) and not x.small)
    if not isinstance(val, Tensor):
        return None
    return next((x for x in wide if x.val.ndim == val.ndim and all(map(same, x.val.shape, val.shape))), None)


def is_pointwise(target: Any) -> bool:
    if not isinstance(target, OpOverload):
        return False  # Python's own, on sizes
    return torch.Tag.pointwise in target.tags and torch.Tag.nondeterministic_seeded not in target.tags


def one_of(*tables: Any) -> Callable[[Any], bool]:
    return lambda target: any(target in table for table in tables)


# (does it concern this overload, the rule), tried in order
FORMS: tuple[tuple[Callable[[Any], bool], Callable[..., Any]], ...] = (
    (one_of(CASTS), cast),
    (one_of(KEPT), kept),
    (one_of(FILLED), filled),
    (one_of(PICKS), picked),
    (one_of(ALONG, RESIZE), along),
    (one_of(REDUCE), reduced),
    (one_of(TOTALS), total),
    (one_of(VERDICTS), verdict),
    (one_of(INDEXED), indexed),
    (one_of(LOSSES), nll),
    (one_of({aten.sym_size.int}), length),
    (one_of({aten.size.default, aten.sym_size.default}), lengths),
    (one_of(LAYOUTS), lambda target, *given: LAYOUTS[target](target, *given)),
    (is_pointwise, pointwise),
)  # fmt: skip
