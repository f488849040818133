"""The three custom ops that represent a head in a graph. They call the engines.

The ops are functional, with positional tensors and fixed arity: an absent tensor is an empty one. Each op checks its
operands, asks the planner and calls one engine. Importing this file registers the ops.

    head_stats           one sweep: the statistics, in the order of `contract.STATS`
    head_stats_backward  one sweep: gradients for a per-row upstream: dh, dw, dcols, drows
    head_loss            one sweep: both, for a scalar loss that is linear in the statistics; and a zero, `tie`, that is
                         added to the loss, so that its upstream gradient is d(loss)

With ``float8`` the products of the gradients of `head_loss` may be float8 where the planner finds that they serve.

With a symbolic number of tokens, a call with fewer than ``whole_below`` logits builds them whole, as Inductor would.
With ``keep`` such a call keeps the product h wᵀ for its backward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedhead.kernels.contract import (
    COMPANIONS,
    DIFFERENTIABLE_STATS,
    LINEAR_STATS,
    LOSS_OUTPUTS,
    NO_NEEDS,
    SAVED_STATS,
    STATISTICS,
    STATS,
    Head,
    HeadGrads,
    Needs,
    RowGrads,
    RowStats,
    Windows,
    stat_dtype,
    with_companions,
)
from fusedhead.kernels.torch_engine.product_dtypes import product_dtype
from fusedhead.lowering import autograd, fakes, ranges
from fusedhead.lowering.checks import LabelOutOfRange, head_of, parse_stats
from fusedhead.lowering.engines import Engine, engine_for
from fusedhead.lowering.plan.plan import plan
from fusedhead.lowering.plan.problem import Problem, writes_logits
from fusedhead.lowering.registration import register_op

__all__ = ["SCHEMAS", "LabelOutOfRange"]

_HEAD = "Tensor h, Tensor w, Tensor y, Tensor cols, Tensor rows, Tensor u"
_NEEDS = "bool need_h, bool need_w, bool need_cols, bool need_rows"
_WHOLE = ", int whole_below=0"
_STATS = ", ".join(f"Tensor {name}" for name in STATS)
_UPSTREAM = ", ".join(f"Tensor g_{name}" for name in DIFFERENTIABLE_STATS)
_SAVED = ", ".join(f"Tensor {name}" for name in SAVED_STATS)
_LOSS = ", ".join(f"Tensor {name}" for name in LOSS_OUTPUTS)
_COEFFICIENTS = ", ".join(f"Tensor c_{name}" for name in (*LINEAR_STATS, "square"))
LOSS_STATS = (*LINEAR_STATS, *COMPANIONS)  # what `head_loss` gives
_OUTPUTS_AT = tuple(map((*LOSS_STATS, "dh", "dw", "dcols", "drows", "tie").index, LOSS_OUTPUTS))
SCHEMAS = {
    "head_stats": f"({_HEAD}, str transform, str stats, int memory{_WHOLE}, bool keep=False)"
    f" -> ({_STATS}, Tensor product)",
    "head_stats_backward": f"({_UPSTREAM}, {_HEAD}, {_SAVED}, str transform, int memory, {_NEEDS}{_WHOLE}, "
    "Tensor? product=None) -> (Tensor dh, Tensor dw, Tensor dcols, Tensor drows)",
    "head_loss": f"({_HEAD}, {_COEFFICIENTS}, str transform, str stats, int memory, {_NEEDS}{_WHOLE}, "
    f"bool float8=False) -> ({_LOSS})",
}


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Context without autocast: an op computes in the dtypes of its operands."""
    kind = device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def _problem(head: Head, needs: Needs, **properties: Any) -> Problem:
    """The head as the planner sees it; ``properties``: further fields of `Problem`."""
    h, w, y, _, _, _, transform = head
    (n, hidden), vocab, dtype, kind = h.shape, w.shape[0], h.dtype, h.device.type
    products = product_dtype(dtype, kind)
    return Problem(n, vocab, hidden, dtype, kind, products, needs, transform=transform, labels=y.shape[1], **properties)


def _chosen(problem: Problem, memory: int, whole_below: int) -> tuple[Engine, Windows]:
    """The engine for a head, and its windows."""
    chosen = plan(problem, memory=memory, whole_below=whole_below)
    return chosen.engine, chosen.windows


def _none_if_empty(x: Tensor) -> Tensor | None:
    return x if x.numel() else None


def _empty_if_absent(x: Tensor | None, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return like.new_empty(0, dtype=dtype or stat_dtype(like.dtype)) if x is None else x


def _gradients(grads: HeadGrads, head: Head) -> tuple[Tensor, ...]:
    operands = (head.h, head.w, head.cols, head.rows)
    return tuple([x.new_empty(0) if g is None else g for g, x in zip(grads, operands)])  # no frame a gradient


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
    whole_below: int = 0,
    keep: bool = False,
) -> tuple[Tensor, ...]:
    head, want = head_of((h, w, y, cols, rows, u), transform), parse_stats(stats)
    explicit, names = writes_logits(want, head.transform), with_companions(want)
    problem = _problem(head, NO_NEEDS, linear=True, row_scale=True, explicit=explicit)
    engine, windows = _chosen(problem, memory, whole_below)
    product = fakes.kept_product(h, w, whole_below, keep)
    kept = product[: h.shape[0]] if keep and engine.keeps_product else None
    with without_autocast(head.h.device):
        got = engine.head_stats(head, names - {"lse_low"}, windows, kept)  # it comes with any lse
    results = [
        _empty_if_absent(getattr(got, statistic.name) if statistic.name in names else None, h, statistic.dtype)
        for statistic in STATISTICS
    ]
    return (*results, product)


class BackwardSettings(NamedTuple):
    """The arguments of `head_stats_backward` that follow its tensors, by their names in the schema."""

    transform: str
    memory: int
    need_h: bool
    need_w: bool
    need_cols: bool
    need_rows: bool
    whole_below: int = 0
    product: Tensor | None = None
    dh: torch.dtype | None = None  # `Windows.dh`, for callers of the implementation

    @property
    def needs(self) -> Needs:
        return Needs(self.need_h, self.need_w, self.need_cols, self.need_rows)


def _head_stats_backward(*args: Any) -> tuple[Tensor, ...]:
    grads, operands, stats, rest = autograd.split_at(
        args, len(DIFFERENTIABLE_STATS), autograd.HEAD_OPERANDS, len(SAVED_STATS)
    )
    settings = BackwardSettings(*rest)
    head, needs, product = head_of(operands, settings.transform), settings.needs, settings.product
    upstream = RowGrads(**{name: _none_if_empty(g) for name, g in zip(DIFFERENTIABLE_STATS, grads)})
    saved = _saved_stats(head, dict(zip(SAVED_STATS, stats)))
    row_scale = engine_for(head.h.dtype, head.h.device.type).row_scale_serves(head, upstream, needs)
    problem = _problem(head, needs, linear=False, row_scale=row_scale, explicit=not row_scale)
    engine, windows = _chosen(problem, settings.memory, settings.whole_below)
    windows = windows._replace(dh=settings.dh)
    kept = product[: head.h.shape[0]] if product is not None and engine.keeps_product else None
    with without_autocast(head.h.device):
        return _gradients(engine.head_stats_backward(head, upstream, saved, needs, windows, kept), head)


def _saved_stats(head: Head, stats: dict[str, Tensor]) -> RowStats:
    """The statistics that the backward reads, from the tensors that the forward saved."""
    lse = stats["lse"]
    if not lse.numel():  # no statistic needed it, so that no gradient does
        lse = head.h.new_zeros(head.h.shape[0], dtype=lse.dtype)
    optional: dict[str, Any] = {name: _none_if_empty(x) for name, x in stats.items() if name != "lse"}
    return RowStats(lse, **optional)


def _coefficients(coefficients: Sequence[Tensor], want: frozenset[str], h: Tensor) -> RowGrads:
    """The coefficients of the linear statistics and of the squared lse, as engines take them; empty ones are absent.

    A sum that is wanted without a coefficient gets zeros: engines compute it beside one.
    """
    c_lse, c_picked, c_sum, c_square = map(_none_if_empty, coefficients)
    if want & {"sum", "spread"} and c_sum is None:
        c_sum = h.new_zeros(h.shape[0], dtype=stat_dtype(h.dtype))
    return RowGrads(c_lse, c_picked, c_sum, square=c_square)


def _loss_problem(head: Head, needs: Needs, c: RowGrads, float8: bool = False) -> Problem:
    """A loss that is linear in the statistics, as the planner sees it."""
    preferred = engine_for(head.h.dtype, head.h.device.type)
    row_scale = preferred.row_scale_serves(head, c, needs)
    return _problem(
        head, needs, linear=True, row_scale=row_scale, explicit=not row_scale, sums=c.sum is not None,
        float8=float8 and preferred.float8_serves(head),
    )  # fmt: skip


def _loss_outputs(
    h: Tensor, want: frozenset[str], stats: Mapping[str, Tensor | None], grads: Sequence[Tensor], tie: Tensor | None
) -> tuple[Tensor, ...]:
    """The results of `head_loss` in the order of its schema: statistics by name, gradients, and the tie."""
    names, dtype = with_companions(want | {"lse"}), stat_dtype(h.dtype)
    results: list[Tensor | None] = [stats.get(name) if name in names else None for name in LOSS_STATS]
    results += (*grads, h.new_full((), -0.0, dtype=dtype) if tie is None else tie)
    return tuple([h.new_empty(0, dtype=dtype) if x is None else x for x in map(results.__getitem__, _OUTPUTS_AT)])


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
    whole_below: int = 0,
    float8: bool = False,
) -> tuple[Tensor, ...]:
    head, want = head_of((h, w, y, cols, rows, u), transform), parse_stats(stats)
    if not want.issubset(LOSS_STATS):
        names = f"{', '.join(LOSS_STATS[:-1])} and {LOSS_STATS[-1]}"
        raise ValueError(f"head_loss gives {names}; {stats!r} asks for more")
    needs = Needs(need_h, need_w, need_cols, need_rows)
    c = _coefficients((c_lse, c_picked, c_sum, c_square), want, h)
    engine, windows = _chosen(_loss_problem(head, needs, c, float8), memory, whole_below)
    with without_autocast(head.h.device):
        got, grads = engine.head_loss(head, c, needs, windows)
    return _loss_outputs(h, want, got._asdict(), _gradients(grads, head), got.tie)


Implementation = Callable[..., Any]
_PARTS: dict[str, tuple[Implementation, Implementation, tuple[Implementation, Implementation]]] = {
    "head_stats": (_head_stats, fakes.fake_head_stats, autograd.HEAD_STATS),
    "head_stats_backward": (_head_stats_backward, fakes.fake_head_stats_backward, autograd.DIFFERENTIATED_ONCE),
    "head_loss": (_head_loss, fakes.fake_head_loss, autograd.HEAD_LOSS),
}
for _name, (_implementation, _fake, _derivative) in _PARTS.items():
    _implementation = ranges.ranged(_name, ranges.operands_named(SCHEMAS[_name]), _implementation)
    register_op(_name, SCHEMAS[_name], _implementation, _fake, _derivative)
    # the same without autograd, for graphs whose gradients are traced (`fusedhead.inductor.call_below_autograd`)
    register_op(f"{_name}_traced", SCHEMAS[_name], _implementation, _fake)
    torch.library.impl(f"fusedhead::{_name}_traced", "Autograd", torch.library.fallthrough_kernel)
