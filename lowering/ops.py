"""The three custom ops that stand for a head in a graph, and the way from them to an engine.

Functional, tensors positional, fixed arity: what is absent travels as a tensor of no elements. Each op
checks its operands, asks the planner and calls one engine; importing this file registers ops, fakes and
autograd. It must not know how a head is computed or where in a program it came from.

    head_stats           one sweep: the statistics                        lse, picked, sum, entropy, max, argmax
    head_stats_backward  one sweep: gradients for any per-row upstream     dh, dw, dcols, drows
    head_loss            one sweep: statistics, and gradients for a scalar loss that is linear in them
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from fusedhead.kernels.columns import parse
from fusedhead.kernels.contract import STATS, Head, HeadGrads, Needs, RowGrads, RowStats, stat_dtype
from fusedhead.lowering import autograd
from fusedhead.lowering.plan import plan

Six = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
Four = tuple[Tensor, Tensor, Tensor, Tensor]
Seven = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]

_HEAD = "Tensor h, Tensor w, Tensor y, Tensor cols, Tensor rows, Tensor u"
_NEEDS = "bool need_h, bool need_w, bool need_cols, bool need_rows"
SCHEMAS = {
    "head_stats": f"({_HEAD}, str transform, str stats, int memory)"
    " -> (Tensor lse, Tensor picked, Tensor sum, Tensor entropy, Tensor max, Tensor argmax)",
    "head_stats_backward": "(Tensor g_lse, Tensor g_picked, Tensor g_sum, Tensor g_entropy, "
    f"{_HEAD}, Tensor lse, Tensor entropy, str transform, int memory, {_NEEDS})"
    " -> (Tensor dh, Tensor dw, Tensor dcols, Tensor drows)",
    "head_loss": f"({_HEAD}, Tensor c_lse, Tensor c_picked, Tensor c_sum, Tensor c_square, "
    f"str transform, str stats, int memory, {_NEEDS})"
    " -> (Tensor lse, Tensor picked, Tensor sum, Tensor dh, Tensor dw, Tensor dcols, Tensor drows)",
}


class LabelOutOfRange(IndexError, RuntimeError):
    """A label is no column of the logits. Both kinds of error that eager code raises: cross_entropy and
    gather."""


def _asked(stats: str) -> frozenset[str]:
    want = frozenset(stats.split(",")) - {""}
    unknown = sorted(want.difference(STATS))
    if unknown:
        raise ValueError(f"statistic {unknown[0]!r} is not known; expected some of {', '.join(STATS)}")
    return want


def _engine(name: str) -> ModuleType:
    return import_module(f"fusedhead.kernels.{name}")


def _size(what: str, got: int, other: str, expected: int) -> None:
    if got != expected:
        raise ValueError(f"{what} is {got} but {other} is {expected}; they must be equal")


def _check(head: Head) -> None:
    """Sizes and dtypes agree, labels name columns. Labels are read on the CPU only: elsewhere it would be a
    sync."""
    h, w, y, cols, rows, u, _ = head
    if h.dim() != 2 or w.dim() != 2 or y.dim() != 2:
        raise ValueError(
            f"h, w and y must be matrices, got shapes {list(h.shape)}, {list(w.shape)}, {list(y.shape)}"
        )
    _size("the hidden size of h", h.shape[1], "the hidden size of w", w.shape[1])
    _size("the number of label rows", y.shape[0], "the number of tokens of h", h.shape[0])
    if cols.numel():
        _size("the length of the column vectors", cols.shape[1], "the vocabulary of w", w.shape[0])
    if rows.numel():
        _size("the length of the row vectors", rows.shape[1], "the number of tokens of h", h.shape[0])
    if u.numel():
        _size("the length of the weights u", u.shape[0], "the vocabulary of w", w.shape[0])
    if h.dtype != w.dtype:
        raise ValueError(f"h has dtype {h.dtype} but w has dtype {w.dtype}; they must be equal")
    if y.numel() and y.device.type == "cpu":
        least, most = (int(x) for x in y.aminmax())
        if least < 0 or most >= w.shape[0]:
            wrong = least if least < 0 else most
            raise LabelOutOfRange(f"label {wrong} is out of range: labels must lie in [0, {w.shape[0] - 1}]")


def _or_empty(x: Tensor | None, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return like.new_empty(0, dtype=dtype or stat_dtype(like.dtype)) if x is None else x


def _or_none(x: Tensor) -> Tensor | None:
    return x if x.numel() else None


def _head_stats(
    h: Tensor,
    w: Tensor,
    y: Tensor,
    cols: Tensor,
    rows: Tensor,
    u: Tensor,
    transform: str,
    stats: str,
    memory: int,
) -> Six:
    head, want = Head(h, w, y, cols, rows, u, parse(transform)), _asked(stats)
    _check(head)
    chosen = plan(h.shape[0], w.shape[0], h.shape[1], h.dtype, h.device.type)
    got: RowStats = _engine(chosen.engine).head_stats(head, want, chosen.windows)
    return (
        _or_empty(got.lse if want & {"lse", "entropy"} else None, h),
        _or_empty(got.picked, h),
        _or_empty(got.sum, h),
        _or_empty(got.entropy, h),
        _or_empty(got.max, h),
        _or_empty(got.argmax, h, torch.int64),
    )


def _gradients(grads: HeadGrads, head: Head) -> Four:
    return (
        _or_empty(grads.h, head.h, head.h.dtype),
        _or_empty(grads.w, head.w, head.w.dtype),
        _or_empty(grads.cols, head.cols, head.cols.dtype),
        _or_empty(grads.rows, head.rows, head.rows.dtype),
    )


def _head_stats_backward(
    g_lse: Tensor,
    g_picked: Tensor,
    g_sum: Tensor,
    g_entropy: Tensor,
    h: Tensor,
    w: Tensor,
    y: Tensor,
    cols: Tensor,
    rows: Tensor,
    u: Tensor,
    lse: Tensor,
    entropy: Tensor,
    transform: str,
    memory: int,
    need_h: bool,
    need_w: bool,
    need_cols: bool,
    need_rows: bool,
) -> Four:
    head, needs = Head(h, w, y, cols, rows, u, parse(transform)), Needs(need_h, need_w, need_cols, need_rows)
    upstream = RowGrads(_or_none(g_lse), _or_none(g_picked), _or_none(g_sum), _or_none(g_entropy))
    saved = RowStats(lse=lse, entropy=_or_none(entropy))
    chosen = plan(h.shape[0], w.shape[0], h.shape[1], h.dtype, h.device.type)
    grads = _engine(chosen.engine).head_stats_backward(head, upstream, saved, needs, chosen.windows)
    return _gradients(grads, head)


def _head_loss(
    h: Tensor,
    w: Tensor,
    y: Tensor,
    cols: Tensor,
    rows: Tensor,
    u: Tensor,
    c_lse: Tensor,
    c_picked: Tensor,
    c_sum: Tensor,
    c_square: Tensor,
    transform: str,
    stats: str,
    memory: int,
    need_h: bool,
    need_w: bool,
    need_cols: bool,
    need_rows: bool,
) -> Seven:
    head, needs = Head(h, w, y, cols, rows, u, parse(transform)), Needs(need_h, need_w, need_cols, need_rows)
    want = _asked(stats)
    if want - {"lse", "picked", "sum"}:
        raise ValueError(f"head_loss gives lse, picked and sum; {stats!r} asks for more")
    _check(head)
    coefficients = RowGrads(_or_none(c_lse), _or_none(c_picked), _or_none(c_sum), square=_or_none(c_square))
    if "sum" in want and coefficients.sum is None:
        coefficients = coefficients._replace(sum=torch.zeros_like(h[:, 0], dtype=stat_dtype(h.dtype)))
    chosen = plan(h.shape[0], w.shape[0], h.shape[1], h.dtype, h.device.type)
    got, grads = _engine(chosen.engine).head_loss(head, coefficients, needs, chosen.windows)
    return (
        got.lse,
        _or_empty(got.picked if "picked" in want else None, h),
        _or_empty(got.sum if "sum" in want else None, h),
        *_gradients(grads, head),
    )


def _fake_stats(h, w, y, cols, rows, u, transform, stats, memory):  # type: ignore[no-untyped-def]
    want, dtype, n = _asked(stats), stat_dtype(h.dtype), h.shape[0]

    def rowwise(name: bool, shape: tuple, dtype: torch.dtype = dtype) -> Tensor:
        return h.new_empty(shape if name else (0,), dtype=dtype)

    return (
        rowwise(bool(want & {"lse", "entropy"}), (n,)),
        rowwise("picked" in want, (n, y.shape[1])),
        rowwise("sum" in want, (n,)),
        rowwise("entropy" in want, (n,)),
        rowwise("max" in want, (n,)),
        rowwise("argmax" in want, (n,), torch.int64),
    )


def _fake_gradients(h, w, cols, rows, need_h, need_w, need_cols, need_rows):  # type: ignore[no-untyped-def]
    return tuple(
        x.new_empty(x.shape if need else (0,))
        for x, need in ((h, need_h), (w, need_w), (cols, need_cols), (rows, need_rows))
    )


def _fake_backward(  # type: ignore[no-untyped-def]
    g_lse, g_picked, g_sum, g_entropy, h, w, y, cols, rows, u, lse, entropy, transform, memory, *needs
):
    return _fake_gradients(h, w, cols, rows, *needs)


def _fake_loss(  # type: ignore[no-untyped-def]
    h, w, y, cols, rows, u, c_lse, c_picked, c_sum, c_square, transform, stats, memory, *needs
):
    got = _fake_stats(h, w, y, cols, rows, u, transform, "lse," + stats, memory)
    return (*got[:3], *_fake_gradients(h, w, cols, rows, *needs))


_PARTS = {
    "head_stats": (_head_stats, _fake_stats, autograd.HEAD_STATS),
    "head_stats_backward": (_head_stats_backward, _fake_backward, autograd.HEAD_STATS_BACKWARD),
    "head_loss": (_head_loss, _fake_loss, autograd.HEAD_LOSS),
}
for _name, (_implementation, _fake, (_setup, _backward)) in _PARTS.items():
    _qualified = f"fusedhead::{_name}"
    torch.library.define(_qualified, SCHEMAS[_name], tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(_qualified, "default", _implementation)
    torch.library.register_fake(_qualified, _fake)
    torch.library.register_autograd(_qualified, _backward, setup_context=_setup)
