"""Which ATen ops treat every token apart, and their form on [N, ...]: the rules behind row programs.

An op qualifies if its result for a token depends on that token's operands only. Pointwise ops are told by their
tag, the others stand in tables with the place of their dimension argument. A composite op is taken apart first.
Every rule gives the same numbers as the op itself, because it is the op itself, on fewer rows.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import maybe_get_fake_mode
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._pytree import tree_leaves, tree_map

from fusedhead.emit import static
from fusedhead.rowwise import RowCall, RowLeaf, RowOutput, Rowwise, Seed
from fusedhead.rules.table import Family
from fusedhead.values import FOLLOWED, Call, Escape, Expected, Followed, Logits, LogProbs, Plain, Probs

aten = torch.ops.aten

# overload -> position of its dimension argument; the result has the shape of the operand
ALONG: dict[Any, int] = {
    aten.softmax.int: 1, aten._softmax.default: 1, aten.log_softmax.int: 1, aten._log_softmax.default: 1,
    aten.cumsum.default: 1, aten.logcumsumexp.default: 1, aten.argsort.default: 1,
}  # fmt: skip
# overload -> position of its dimension argument; that dimension goes, or stays as 1
REDUCE: dict[Any, int] = {
    aten.sum.dim_IntList: 1, aten.mean.dim: 1, aten.amax.default: 1, aten.amin.default: 1,
    aten.logsumexp.default: 1, aten.argmax.default: 1, aten.argmin.default: 1, aten.max.dim: 1, aten.min.dim: 1,
    aten.prod.dim_int: 1, aten.any.dim: 1, aten.all.dim: 1, aten.var.correction: 1, aten.std.correction: 1,
    aten.linalg_vector_norm.default: 2,
}  # fmt: skip
# overload -> position of its dimension argument; that dimension changes its length
RESIZE: dict[Any, int] = {aten.topk.default: 2, aten.sort.default: 1, aten.slice.Tensor: 1}
LISTED = (ALONG, REDUCE, RESIZE)  # overloads that the table of what is fused names
FAMILY = Family(
    "anything else, token by token",
    "the program's own ops on some tokens at a time, and again in the backward: targets that are probabilities, KL "
    "between heads, adapters (LoRA) on a head, margins, mixtures, every pointwise op",
    "ops that run over tokens, or mix tokens and classes; the same inside a checkpointed region",
)
DEFAULT_DIM = {aten.topk.default: -1, aten.sort.default: -1, aten.argsort.default: -1, aten.slice.Tensor: 0}
TOTALS = {aten.sum.default: aten.sum.dim_IntList, aten.mean.default: aten.mean.dim}
SPLIT = frozenset({aten.sum.dim_IntList, aten.mean.dim})  # over tokens too: the rest is done on the row results
INDEXED = frozenset({aten.gather.default, aten.scatter.value, aten.scatter.src, aten.scatter_add.default})
LOSSES = frozenset({aten.cross_entropy_loss.default, aten.nll_loss.default, aten.nll_loss_nd.default})
CASTS = frozenset({aten.to.dtype, aten._to_copy.default, aten.type_as.default})
KEPT = frozenset({aten.clone.default, aten.contiguous.default, aten.alias.default})
FILLED = {
    aten.zeros_like.default: 0.0, aten.ones_like.default: 1.0, aten.full_like.default: None, aten.fill.Scalar: None,
}  # fmt: skip


def read(target: Any, val: Any, traced: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """What an op makes of rowwise or followed operands. Raises Escape where it does not treat tokens apart.

    ``val`` is the fake result in the program, ``traced`` that of the op alone: they differ where autocast acts.
    """
    args, kwargs = tree_map(rowwise, (args, kwargs), is_leaf=lambda x: isinstance(x, FOLLOWED))
    wanted, made = first_dtype(val), first_dtype(traced)
    if wanted != made and wanted is not None and made is not None and wanted.itemsize > made.itemsize:
        args, kwargs = tree_map(lambda x: widened(x, wanted), (args, kwargs))
    elif wanted != made and target not in CASTS:
        raise Escape(f"{target} gives {wanted} under autocast")
    for matches, form in FORMS:
        if matches(target):
            return form(target, val, args, kwargs)
    if not torch._C._dispatch_has_kernel_for_dispatch_key(target.name(), "CompositeImplicitAutograd"):
        raise Escape(f"{target} is not known to treat tokens apart")
    return taken_apart(target, val, args, kwargs)


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
    p = RowCall(aten.softmax.int, (seed, 1, dtype))
    x = RowCall(aten.log_softmax.int, (seed, 1, dtype)) if value.log else seed
    return scaled(RowCall(aten.mul.Tensor, (p, x)))


def heads_of(values: Any) -> frozenset[Any]:
    return frozenset().union(*(v.heads for v in tree_leaves(values) if isinstance(v, Rowwise)))


def size(s: Any, what: str) -> int:
    known = static(s)
    if known is None:
        raise Escape(f"{what} has a dimension of symbolic size")
    return known


def same(a: Any, b: Any) -> bool:
    return statically_known_true(a == b)


def constants(x: Any) -> Any:
    """An argument that is no tensor, as a constant."""
    if isinstance(x, Plain) and not isinstance(x.val, Tensor):
        return size(x.val, "an argument") if isinstance(x.val, torch.SymInt) else x.val
    if isinstance(x, torch.SymInt):
        return size(x, "an argument")
    return x


# ---- how operands line up


def common_tail(val: Tensor, operands: Sequence[Rowwise]) -> tuple[bool, ...]:
    """Which dimensions of a pointwise result are its tail. Raises Escape where operands disagree on the tokens."""
    roles: list[bool] = []
    for d in range(val.ndim):
        votes: list[tuple[bool, bool]] = []  # (has its full length, is tail)
        for x in operands:
            at = d - (val.ndim - x.val.ndim)
            if at >= 0:
                votes.append((same(x.val.shape[at], val.shape[d]) and not same(x.val.shape[at], 1), x.tail[at]))
        firm = {tail for full, tail in votes if full}
        if len(firm) > 1:
            raise Escape("tokens and classes are combined with each other")
        weak = {tail for _, tail in votes}
        role = firm.pop() if firm else (True in weak if votes else False)
        if not role:
            for x in operands:
                at = d - (val.ndim - x.val.ndim)
                if at < 0 or not same(x.val.shape[at], val.shape[d]):
                    if at < 0 and same(val.shape[d], 1):
                        continue
                    raise Escape("logits are repeated over tokens")
        roles.append(role)
    return tuple(roles)


def lined_up(x: Any, tail: tuple[bool, ...], shape: Sequence[Any], *, by_rows: bool = False) -> Any:
    """An operand of a call whose result has dimensions ``tail`` and ``shape``, in its [N, ...] form."""
    if isinstance(x, Plain) and isinstance(x.val, Tensor):
        return leaf(x, tail, shape, by_rows)
    if not isinstance(x, Rowwise):
        return constants(x)
    if x.tail == tail:
        return x.expr
    own = [1] * (len(tail) - x.val.ndim) + list(x.val.shape)
    return RowCall(aten.reshape.default, (x.expr, (-1, *tails_of(own, tail))))


def tails_of(shape: Sequence[Any], tail: tuple[bool, ...]) -> list[int]:
    return [size(s, "a dimension beside the tokens") for s, is_tail in zip(shape, tail) if is_tail]


def leaf(x: Plain, tail: tuple[bool, ...], shape: Sequence[Any], by_rows: bool) -> RowLeaf:
    """A tensor from outside that broadcasts to ``shape``; with ``by_rows`` as [N, ...] even where it need not be."""
    missing = len(tail) - x.val.ndim
    own = [1] * missing + list(x.val.shape)
    tails = tails_of(own, tail)
    rows = [d for d, is_tail in enumerate(tail) if not is_tail]
    if not by_rows and all(same(own[d], 1) for d in rows):
        fits = x.val.ndim == 0 or list(x.val.shape) == tails
        return RowLeaf(x if fits else Plain(Call(aten.reshape.default, (x, tails)), x.val.reshape(tails)), False)
    node: Any = x
    if any(not same(own[d], shape[d]) for d in rows):
        if math.prod(tails) > 1:
            raise Escape("an operand as wide as the logits is repeated over tokens")
        full = [own[d] if is_tail else shape[d] for d, is_tail in enumerate(tail)]
        node = Call(aten.expand.default, (x, [size(s, "an operand that is repeated over tokens") for s in full]))
        missing = 0
    present = range(missing, len(tail))
    order = [d - missing for d in present if not tail[d]] + [d - missing for d in present if tail[d]]
    if order != sorted(order):
        node = Call(aten.permute.default, (node, order))
    if node is not x or x.val.ndim != 1 + len(tails):
        node = Call(aten.reshape.default, (node, [-1, *tails]))
    return RowLeaf(node if isinstance(node, Plain) else Plain(node, x.val), True)


def pointwise(target: Any, val: Any, args: tuple, kwargs: dict[str, Any]) -> Rowwise:
    operands = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Rowwise)]
    tail = common_tail(val, operands)
    given, named = tree_map(lambda x: lined_up(x, tail, val.shape), (args, kwargs))
    named = {k: v for k, v in named.items() if k not in ("memory_format", "device", "layout", "pin_memory")}
    return Rowwise(RowCall(target, given, named), val, tail, heads_of(operands))


# ---- ops along dimensions


def operand(x: Any, target: Any) -> Rowwise:
    if not isinstance(x, Rowwise):
        raise Escape(f"{target} takes what comes from the logits in another place than its first")
    return x


def tail_dim(x: Rowwise, dim: int, target: Any) -> int:
    """A dimension of the program's tensor as one of [N, *tail]."""
    d = dim % x.val.ndim
    if not x.tail[d]:
        raise Escape(f"{target} runs over tokens")
    return 1 + sum(x.tail[:d])


def replaced(args: tuple, at: int, by: Any) -> tuple:
    return (*args[:at], by, *args[at + 1 :])


def several(call: RowCall, val: Any, tail: tuple[bool, ...], heads: frozenset[Any]) -> Any:
    """One rowwise value, or a list of them for an op with several results."""
    if isinstance(val, Tensor):
        return Rowwise(call, val, tail, heads)
    return [Rowwise(RowCall(operator.getitem, (call, i)), v, tail, heads) for i, v in enumerate(val)]


def dim_of(target: Any, args: tuple, kwargs: dict[str, Any], at: int) -> tuple[Any, tuple, dict[str, Any]]:
    """The dimension argument, and the arguments with its place filled, all positional up to it."""
    kwargs = dict(kwargs)
    names = [a.name for a in target._schema.arguments]
    filled = list(args)
    while len(filled) <= at:
        name = names[len(filled)]
        if name in kwargs:
            filled.append(kwargs.pop(name))
        elif len(filled) == at:
            filled.append(DEFAULT_DIM.get(target))
        else:
            filled.append(target._schema.arguments[len(filled)].default_value)
    return constants(filled[at]), tuple(filled), kwargs


def plain_arguments(args: tuple, kwargs: dict[str, Any], target: Any) -> tuple[tuple, dict[str, Any]]:
    if any(isinstance(x, Plain) and isinstance(x.val, Tensor) for x in tree_leaves((args, kwargs))):
        raise Escape(f"{target} takes another tensor")
    given, named = tree_map(constants, (args, kwargs))
    return given, named


def along(target: Any, val: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    x = operand(args[0], target)
    dim, args, kwargs = dim_of(target, args, kwargs, (ALONG | RESIZE)[target])
    rest, named = plain_arguments(args[1:], kwargs, target)
    given = replaced((x.expr, *rest), (ALONG | RESIZE)[target], tail_dim(x, dim, target))
    return several(RowCall(target, given, named), val, x.tail, x.heads)


def reduced(target: Any, val: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    at = REDUCE[target]
    x = operand(args[0], target)
    dim, args, kwargs = dim_of(target, args, kwargs, at)
    listed = [dim] if isinstance(dim, int) else [*map(constants, dim or ())]
    dims = [d % x.val.ndim for d in listed] or list(range(x.val.ndim))
    if any(not x.tail[d] for d in dims):
        return split(target, val, x, dims, args, kwargs)
    rest, named = plain_arguments(args[1:], kwargs, target)
    inner = [tail_dim(x, d, target) for d in dims]
    given = replaced((x.expr, *rest), at, inner[0] if isinstance(dim, int) else tuple(inner))
    first = val if isinstance(val, Tensor) else val[0]
    kept = first.ndim == x.val.ndim
    tail = x.tail if kept else tuple(t for d, t in enumerate(x.tail) if d not in dims)
    return several(RowCall(target, given, named), val, tail, x.heads)


def split(target: Any, val: Any, x: Rowwise, dims: list[int], args: tuple, kwargs: dict[str, Any]) -> Plain:
    """A sum or mean over tokens too: over the tail in the program's rows, over tokens in the graph."""
    if target not in SPLIT:
        raise Escape(f"{target} runs over tokens")
    keepdim = (len(args) > 2 and bool(args[2])) or bool(kwargs.get("keepdim", False))
    wide = torch.float64 if x.val.dtype == torch.float64 else torch.float32 if val.is_floating_point() else val.dtype
    inner = tuple(d for d in dims if x.tail[d])
    rows = x
    if inner:
        call = RowCall(target, (x.expr, tuple(tail_dim(x, d, target) for d in inner), True), {"dtype": wide})
        rows = Rowwise(call, target(x.val, inner, True, dtype=wide), x.tail, x.heads)
    elif not x.small:
        raise Escape(f"{target} of the logits over tokens alone")
    out = Call(target, (RowOutput(rows), dims, keepdim))
    return Plain(Call(aten.to.dtype, (out, val.dtype)), val)


def total(target: Any, val: Any, args: tuple, kwargs: dict[str, Any]) -> Plain:
    x = operand(args[0], target)
    return split(TOTALS[target], val, x, list(range(x.val.ndim)), (), {})


def indexed(target: Any, val: Any, args: tuple, kwargs: dict[str, Any]) -> Rowwise:
    """gather and scatter along the tail: all tensors have the operand's dimensions, and its tokens."""
    like = next(a for a in args if isinstance(a, Rowwise))
    tail_dim_at = tail_dim(like, constants(args[1]), target)
    given: list[Any] = []
    for at, x in enumerate(args):
        if at == 1:
            given.append(tail_dim_at)
        elif isinstance(x, (Rowwise, Plain)) and isinstance(x.val, Tensor):
            if x.val.ndim != like.val.ndim or any(
                not t and not same(a, b) for t, a, b in zip(like.tail, x.val.shape, like.val.shape)
            ):
                raise Escape(f"{target} reads only some of the tokens")
            given.append(lined_up(x, like.tail, x.val.shape, by_rows=True))
        else:
            given.append(constants(x))
    named = {k: constants(v) for k, v in kwargs.items() if k not in ("sparse_grad",)}
    return Rowwise(RowCall(target, tuple(given), named), val, like.tail, heads_of(args))


NOT_CLASSES = "the classes of a loss are not the dimension that the logits have them in"


def nll(target: Any, val: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """cross_entropy and nll_loss of class labels: token by token, then reduced in the graph as they reduce."""
    names = [a.name for a in target._schema.arguments]
    given = {a.name: a.default_value for a in target._schema.arguments} | dict(zip(names, args)) | kwargs
    x, labels, weight = given["self"], given["target"], given["weight"]
    if not isinstance(x, Rowwise) or not isinstance(labels, Plain) or isinstance(weight, Rowwise):
        raise Escape(f"{target} takes what comes from the logits in another place than its first")
    if labels.val.is_floating_point():
        return taken_apart(target, val, args, kwargs)
    if x.tail != tuple(d == (1 if x.val.ndim > 1 else 0) for d in range(x.val.ndim)):
        raise Escape(NOT_CLASSES)
    rows = tuple(False for _ in labels.val.shape)
    label = leaf(labels, rows, labels.val.shape, True)
    whole = None if weight is None else RowLeaf(weight, False)
    ignored = constants(given["ignore_index"])
    smoothing = {"label_smoothing": constants(given["label_smoothing"])} if "label_smoothing" in given else {}
    last = {"reduction": 0, "ignore_index": ignored, **smoothing}
    each = Rowwise(RowCall(target, (x.expr, label, whole), last), labels.val.to(x.val.dtype), rows, x.heads)
    if constants(given["reduction"]) == 0:
        return each
    wide = {"dtype": torch.float64 if x.val.dtype == torch.float64 else torch.float32}
    out = Call(aten.sum.default, (RowOutput(each),), wide)
    if constants(given["reduction"]) == 1:
        counted: Any = Call(aten.ne.Scalar, (labels, ignored))
        if weight is not None:
            known = Call(aten.mul.Tensor, (Call(aten.to.dtype, (labels, torch.int64)), counted))
            flat = Call(aten.reshape.default, (known, [-1]))
            of_label = Call(aten.index_select.default, (weight, 0, flat))
            counted = Call(aten.mul.Tensor, (of_label, Call(aten.reshape.default, (counted, [-1]))))
        out = Call(aten.div.Tensor, (out, Call(aten.sum.default, (counted,))))
    return Plain(Call(aten.to.dtype, (out, val.dtype)), val)


def joined(target: Any, val: Any, args: tuple, kwargs: dict[str, Any]) -> Rowwise:
    """cat along the tail, or stack into a new dimension of it."""
    listed, dim = args[0], constants(args[1] if len(args) > 1 else kwargs.get("dim", 0))
    like = next(x for x in listed if isinstance(x, Rowwise))
    stacked = target is aten.stack.default
    d = dim % val.ndim
    tail = (*like.tail[:d], True, *like.tail[d:]) if stacked else like.tail
    if not tail[d]:
        raise Escape(f"{target} runs over tokens")
    if any((isinstance(x, Rowwise) and x.tail != like.tail) or not isinstance(x, (Rowwise, Plain)) for x in listed):
        raise Escape("tokens and classes are combined with each other")
    if any(not t and not same(a, b) for x in listed for t, a, b in zip(like.tail, x.val.shape, like.val.shape)):
        raise Escape("logits of different tokens are joined")
    exprs = [lined_up(x, like.tail, x.val.shape, by_rows=True) for x in listed]
    return Rowwise(RowCall(target, (exprs, 1 + sum(tail[:d]))), val, tail, heads_of(listed))


def selected(target: Any, val: Any, args: tuple, kwargs: dict[str, Any]) -> Rowwise:
    x = operand(args[0], target)
    d = args[1] % x.val.ndim
    call = RowCall(target, (x.expr, tail_dim(x, d, target), constants(args[2])))
    return Rowwise(call, val, (*x.tail[:d], *x.tail[d + 1 :]), x.heads)


def cast(target: Any, val: Any, args: tuple, kwargs: dict[str, Any]) -> Rowwise:
    x = operand(args[0], target)
    if val.device != x.val.device:
        raise Escape("what comes from the logits is moved to another device")
    expr = x.expr if val.dtype == x.val.dtype else RowCall(aten.to.dtype, (x.expr, val.dtype))
    return Rowwise(expr, val, x.tail, x.heads)


def kept(target: Any, val: Any, args: tuple, kwargs: dict[str, Any]) -> Rowwise:
    x = operand(args[0], target)
    return Rowwise(x.expr, val, x.tail, x.heads)


def without_gradient(target: Any, val: Any, args: tuple, kwargs: dict[str, Any]) -> Rowwise:
    x = operand(args[0], target)
    return Rowwise(RowCall(aten.detach.default, (x.expr,)), val, x.tail, x.heads)


def filled(target: Any, val: Any, args: tuple, kwargs: dict[str, Any]) -> Rowwise:
    x = operand(args[0], target)
    given = args[1] if len(args) > 1 else kwargs.get("fill_value")
    value = constants(given) if FILLED[target] is None else FILLED[target]
    return Rowwise(RowCall(aten.full_like.default, (x.expr, value), {"dtype": val.dtype}), val, x.tail, x.heads)


# ---- ops that only say how the dimensions are laid out


def unsqueezed(target: Any, val: Any, args: tuple, kwargs: dict[str, Any]) -> Rowwise:
    x = operand(args[0], target)
    d = args[1] % val.ndim
    last_row = max((i for i, t in enumerate(x.tail) if not t), default=-1)
    among_rows = d <= last_row
    tail = (*x.tail[:d], not among_rows, *x.tail[d:])
    expr = x.expr if among_rows else RowCall(aten.unsqueeze.default, (x.expr, 1 + sum(x.tail[:d])))
    return Rowwise(expr, val, tail, x.heads)


def squeezed(target: Any, val: Any, args: tuple, kwargs: dict[str, Any]) -> Rowwise:
    x = operand(args[0], target)
    listed = args[1] if len(args) > 1 else list(range(x.val.ndim))
    dims = {d % x.val.ndim for d in ([listed] if isinstance(listed, int) else listed)}
    gone = {d for d in dims if same(x.val.shape[d], 1)}
    if x.val.ndim - len(gone) != val.ndim:
        raise Escape("squeeze depends on a symbolic size")
    inner = tuple(1 + sum(x.tail[:d]) for d in sorted(gone) if x.tail[d])
    expr = RowCall(aten.squeeze.dims, (x.expr, inner)) if inner else x.expr
    return Rowwise(expr, val, tuple(t for d, t in enumerate(x.tail) if d not in gone), x.heads)


def reshaped(target: Any, val: Any, args: tuple, kwargs: dict[str, Any]) -> Rowwise:
    """A view that regroups tokens among themselves and the tail among itself."""
    x = operand(args[0], target)
    tails = x.tail_sizes
    if x.tail != tuple(sorted(x.tail)):
        raise Escape("the dimensions of tokens and classes are merged by a view")
    entries = math.prod(size(t, "the tail") for t in tails)
    count, product = 0, 1
    while product != entries or (count < min(len(tails), val.ndim - 1) and same(val.shape[val.ndim - 1 - count], 1)):
        count += 1
        if count > val.ndim:
            raise Escape("the dimensions of tokens and classes are merged by a view")
        product *= size(val.shape[val.ndim - count], "the tail of a view")
        if product > entries:
            raise Escape("the dimensions of tokens and classes are merged by a view")
    shape = tuple(size(s, "the tail") for s in val.shape[val.ndim - count :])
    expr = x.expr if shape == tuple(tails) else RowCall(aten.reshape.default, (x.expr, (-1, *shape)))
    return Rowwise(expr, val, tuple(d >= val.ndim - count for d in range(val.ndim)), x.heads)


def permuted(target: Any, val: Any, args: tuple, kwargs: dict[str, Any]) -> Rowwise:
    x = operand(args[0], target)
    n = x.val.ndim
    order = list(range(n))
    if target is aten.permute.default:
        order = [d % n for d in args[1]]
    elif target is aten.movedim.int:
        order.insert(args[2] % n, order.pop(args[1] % n))
    else:
        a, b = (0, 1) if target is aten.t.default else (args[1] % n, args[2] % n)
        if n > 1:
            order[a], order[b] = order[b], order[a]
    rows, tails = [d for d in order if not x.tail[d]], [d for d in order if x.tail[d]]
    if rows != sorted(rows):
        raise Escape("tokens are put into another order")
    expr = x.expr
    if tails != sorted(tails):
        expr = RowCall(aten.permute.default, (expr, (0, *(1 + sum(x.tail[:d]) for d in tails))))
    return Rowwise(expr, val, tuple(x.tail[d] for d in order), x.heads)


def expanded(target: Any, val: Any, args: tuple, kwargs: dict[str, Any]) -> Rowwise:
    x = operand(args[0], target)
    if val.ndim != x.val.ndim or any(not t and not same(a, b) for t, a, b in zip(x.tail, x.val.shape, val.shape)):
        raise Escape("logits are repeated over tokens")
    tails = tuple(size(s, "the tail") for s, t in zip(val.shape, x.tail) if t)
    expr = x.expr if tails == x.tail_sizes else RowCall(aten.expand.default, (x.expr, (-1, *tails)))
    return Rowwise(expr, val, x.tail, x.heads)


def taken_apart(target: Any, val: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """A composite op by the ops it is made of."""
    leaves = [x for x in tree_leaves((args, kwargs)) if isinstance(x, (Rowwise, Plain))]
    mode = next((m for m in (maybe_get_fake_mode(x.val) for x in leaves if isinstance(x.val, Tensor)) if m), None)
    assert mode is not None

    def call(*values: Any) -> Any:
        given = dict(zip(map(id, leaves), values))
        here, named = tree_map(lambda x: given.get(id(x), x), (args, kwargs))
        return target(*here, **named)

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
            env[node] = here[0][here[1]]
        elif any(isinstance(x, Rowwise) for x in tree_leaves((here, named))):
            if node.target is target:
                raise Escape(f"{target} is not known to treat tokens apart")
            env[node] = read(node.target, node.meta["val"], node.meta["val"], here, named)
        else:
            env[node] = Plain(Call(node.target, here, named), node.meta["val"])
    raise AssertionError("a traced graph has an output")


def length(target: Any, val: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """A size of a rowwise tensor, read off the hidden states where it is a symbol."""
    x = operand(args[0], target)
    known = static(x.val.shape[args[1]])
    if known is not None:
        return known
    for head in x.heads:
        hidden = head.hidden.val
        for d in range(hidden.ndim):
            if same(hidden.shape[d], x.val.shape[args[1]]):
                return Plain(Call(target, (head.hidden, d)), val)
        if same(math.prod(hidden.shape[:-1]), x.val.shape[args[1]]):
            rows = Call(aten.reshape.default, (head.hidden, [-1, size(hidden.shape[-1], "the hidden size")]))
            return Plain(Call(target, (rows, 0)), val)
    raise Escape("a symbolic number of tokens is computed with")


def one_of(*tables: Any) -> Callable[[Any], bool]:
    return lambda target: any(target in table for table in tables)


# overloads that only say how the dimensions are laid out, by the rule that reads them
LAYOUTS: dict[Any, Callable[..., Any]] = {
    aten.unsqueeze.default: unsqueezed,
    aten.squeeze.default: squeezed,
    aten.squeeze.dim: squeezed,
    aten.squeeze.dims: squeezed,
    aten.view.default: reshaped,
    aten.reshape.default: reshaped,
    aten._unsafe_view.default: reshaped,
    aten.flatten.using_ints: reshaped,
    aten.permute.default: permuted,
    aten.transpose.int: permuted,
    aten.t.default: permuted,
    aten.movedim.int: permuted,
    aten.expand.default: expanded,
    aten.detach.default: without_gradient,
    aten.cat.default: joined,
    aten.stack.default: joined,
    aten.select.int: selected,
}
RANDOM = torch.Tag.nondeterministic_seeded
# (does it concern this overload, the rule), tried in order
FORMS: tuple[tuple[Callable[[Any], bool], Callable[..., Any]], ...] = (
    (one_of(CASTS), cast),
    (one_of(KEPT), kept),
    (one_of(FILLED), filled),
    (one_of(ALONG, RESIZE), along),
    (one_of(REDUCE), reduced),
    (one_of(TOTALS), total),
    (one_of(INDEXED), indexed),
    (one_of(LOSSES), nll),
    (one_of({aten.sym_size.int}), length),
    (one_of(LAYOUTS), lambda target, *given: LAYOUTS[target](target, *given)),
    (lambda target: torch.Tag.pointwise in target.tags and RANDOM not in target.tags, pointwise),
)  # fmt: skip
