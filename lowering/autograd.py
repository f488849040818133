"""Autograd of the ops: the tensors that each op saves, and the op that its backward calls.

`head_stats` recomputes in its backward, for any upstream gradient. `head_loss` has computed its gradients up to one
scalar, which it takes from the upstream gradient. Operands that want no gradient are skipped.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

import fusedhead.lowering.scale  # noqa: F401  registers torch.ops.fusedhead.scale
from fusedhead.kernels.contract import COMPANIONS, DIFFERENTIABLE_STATS, LINEAR_STATS, LOSS_OUTPUTS, SAVED_STATS, STATS

HEAD_OPERANDS = 6  # the first tensors of an op: h, w, y, cols, rows, u
ONCE = "a fused head can be differentiated once: double backward through it is not supported"


def _setup_stats(ctx: Any, inputs: tuple, output: tuple) -> None:
    *operands, ctx.transform, _, ctx.memory, ctx.whole_below, ctx.keep = inputs
    results, product = dict(zip(STATS, output)), output[-1]
    saved = [results[name] for name in SAVED_STATS]
    ctx.save_for_backward(*operands, *saved, *([product] if ctx.keep else []))
    ctx.mark_non_differentiable(*(x for name, x in results.items() if name not in DIFFERENTIABLE_STATS), product)
    ctx.set_materialize_grads(False)


def _backward_stats(ctx: Any, *grads: Tensor | None) -> tuple:
    operands, saved, product = split_at(ctx.saved_tensors, HEAD_OPERANDS, len(SAVED_STATS))
    upstream = dict(zip(STATS, grads))
    wanted = [upstream[name] for name in DIFFERENTIABLE_STATS]
    needs = [ctx.needs_input_grad[at] for at in (0, 1, 3, 4)]
    if not any(needs) or all(g is None for g in wanted):
        return (None,) * 11
    absent = saved[0].new_empty(0)
    computed = torch.ops.fusedhead.head_stats_backward(
        *(absent if g is None else g for g in wanted),
        *operands,
        *saved,
        ctx.transform,
        ctx.memory,
        *needs,
        ctx.whole_below,
        *product,
    )
    dh, dw, dcols, drows = (g if need else None for g, need in zip(computed, needs))
    return dh, dw, None, dcols, drows, *(None,) * 6


def split_at(of: Sequence[Any], *counts: int) -> list[Sequence[Any]]:
    """A sequence cut into parts of the given lengths, and the rest."""
    ends = [0, *itertools.accumulate(counts)]
    return [*(of[start:end] for start, end in itertools.pairwise(ends)), of[ends[-1] :]]


def _setup_once(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.set_materialize_grads(False)


def _backward_once(ctx: Any, *grads: Tensor | None) -> NoReturn:
    raise NotImplementedError(ONCE)


def _setup_loss(ctx: Any, inputs: tuple, output: tuple) -> None:
    results = dict(zip(LOSS_OUTPUTS, output))
    gradients = [results[name] for name in ("dh", "dw", "dcols", "drows")]
    ctx.save_for_backward(*inputs[6:10], results["lse"], *gradients)
    ctx.computed = inputs[13:17]
    ctx.mark_non_differentiable(*gradients, *(results[name] for name in COMPANIONS))
    ctx.set_materialize_grads(False)


def upstream_scale(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The scalar g with upstream = g c, by least squares: <upstream, c> / <c, c>, or 0 where c = 0.

    ``pairs`` of (upstream, coefficient), equal shapes, any float dtype -> 0-d tensor. Sums are float64 where
    the device has it, and c is divided by max |c| first, so that coefficients near the ends of the range
    neither underflow nor overflow. Rows whose c is not finite (the squared lse of a broken row) are ignored.
    """
    like = pairs[0][1]
    wide = torch.float32 if like.device.type == "mps" else torch.float64
    g = torch.cat([a.reshape(-1).to(wide) for a, _ in pairs])
    c = torch.cat([b.reshape(-1).to(wide) for _, b in pairs])
    counts = c.isfinite()
    g, c = torch.where(counts, g, 0), torch.where(counts, c, 0)
    most = torch.cat((c.abs(), c.new_zeros(1))).amax()
    unit = c / torch.where(most == 0, 1, most)
    square = (unit * unit).sum()
    return (g * unit).sum() / torch.where(square == 0, 1, square) / torch.where(most == 0, 1, most)


class _Once(torch.autograd.Function):
    """The identity on gradients, whose own backward (``create_graph=True``) raises."""

    @staticmethod
    def forward(ctx: Any, d: Tensor) -> Tensor:
        return d.clone()

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> NoReturn:
        raise NotImplementedError(ONCE)


def scaled(grads: Sequence[Tensor | None], scale: Tensor) -> list[Tensor | None]:
    """Gradients that an op computed up to a factor, times that factor.

    The gradients are constants to autograd, so that a second differentiation is refused explicitly.
    """
    products = (None if d is None else torch.ops.fusedhead.scale.default(d, scale) for d in grads)
    return [_Once.apply(d.requires_grad_()) if d is not None and torch.is_grad_enabled() else d for d in products]


def _empty(x: Tensor) -> bool:
    """Whether x has no elements. Adds no guard for symbolic sizes."""
    return statically_known_true(x.numel() == 0)


def _backward_loss(ctx: Any, *upstream: Tensor | None) -> tuple:
    c_lse, c_picked, c_sum, c_square, lse, *grads = ctx.saved_tensors
    needs = [ctx.needs_input_grad[at] for at in (0, 1, 3, 4)]
    for need, computed, name in zip(needs, ctx.computed, ("h", "w", "cols", "rows")):
        if need and not computed:
            raise RuntimeError(f"{name} requires a gradient but head_loss was called with need_{name}=False")
    if not _empty(c_square):
        slope = 2 * c_square * lse
        c_lse = slope if _empty(c_lse) else c_lse + slope
    by_name = dict(zip(LOSS_OUTPUTS, upstream))
    arrived = zip((by_name[name] for name in LINEAR_STATS), (c_lse, c_picked, c_sum))
    pairs = [(g, c) for g, c in arrived if g is not None and g.dim() == c.dim()]
    pairs = [(g, c) for g, c in pairs if _empty(g) or not _empty(c)]
    scales = [by_name["tie"]] if by_name["tie"] is not None else []  # exactly
    scales += [upstream_scale(pairs)] if pairs else []
    if not scales or not any(needs):
        return (None,) * 19
    wanted = [d if need else None for d, need in zip(grads, needs)]
    dh, dw, dcols, drows = scaled(wanted, functools.reduce(operator.add, scales))
    return dh, dw, None, dcols, drows, *(None,) * 14


HEAD_STATS = (_setup_stats, _backward_stats)
DIFFERENTIATED_ONCE = (_setup_once, _backward_once)
HEAD_LOSS = (_setup_loss, _backward_loss)
