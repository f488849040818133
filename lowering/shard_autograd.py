"""Autograd of a head in shards: the tensors that its op saves, and the op that its backward calls.

The gradients of this rank's own statistics come from those of all by numbers [N] that it has, without a collective
(`shard_merge.own_upstream`). The token's gradient orders the collectives of the backward: the op that came later is
given to the one before. A ``recipient`` stands for the hidden states and takes their gradient, which is then not
rounded to their dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusedhead.kernels.contract import DIFFERENTIABLE_STATS, SAVED_STATS, STATS
from fusedhead.lowering.autograd import HEAD_OPERANDS, split_at
from fusedhead.lowering.shard_merge import own_upstream

INPUTS = 17  # of shard_stats


def split_backward(args: Sequence[Any]) -> list[Sequence[Any]]:
    """The arguments of shard_stats_backward: upstream gradients, operands, this rank's statistics, the rest."""
    return split_at(args, len(DIFFERENTIABLE_STATS), HEAD_OPERANDS, len(SAVED_STATS))


def _setup_stats(ctx: Any, inputs: tuple, output: tuple) -> None:
    *operands, ctx.transform, _, ctx.memory, first, vocab, group, reduce, _, span, after, recipient = inputs
    ctx.place, ctx.has_after = (first, vocab, group, reduce), after is not None
    ctx.has_recipient, ctx.dtype = recipient is not None, operands[0].dtype
    whole, local, _ = split_at(output, len(STATS), len(SAVED_STATS))
    by_name = dict(zip(STATS, whole))
    saved = [by_name[name] for name in SAVED_STATS]
    ctx.save_for_backward(*operands, *saved, *local, *([] if span is None else [span]))
    ctx.mark_non_differentiable(*(x for name, x in by_name.items() if name not in DIFFERENTIABLE_STATS), *local)
    ctx.set_materialize_grads(False)


def _backward_stats(ctx: Any, *arrived: Tensor | None) -> tuple:
    operands, whole, local, span = split_at(ctx.saved_tensors, HEAD_OPERANDS, len(SAVED_STATS), len(SAVED_STATS))
    by_name, after = dict(zip(STATS, arrived)), arrived[-1]
    upstream = {name: by_name[name] for name in DIFFERENTIABLE_STATS}
    needs = [ctx.needs_input_grad[at] for at in (INPUTS - 1 if ctx.has_recipient else 0, 1, 3, 4)]
    if not any(needs) or all(g is None for g in upstream.values()):
        return *(None,) * (INPUTS - 2), after if ctx.has_after else None, None
    own_upstream(upstream, dict(zip(SAVED_STATS, whole)), dict(zip(SAVED_STATS, local)))
    absent = whole[0].new_empty(0)
    *grads, token = torch.ops.fusedhead.shard_stats_backward(
        *(absent if g is None else g for g in upstream.values()),
        *operands,
        *local,
        ctx.transform,
        ctx.memory,
        *needs,
        *ctx.place,
        span[0] if span else None,
        after,
    )
    dh, dw, dcols, drows = (g if need else None for g, need in zip(grads, needs))
    unrounded = dh if ctx.has_recipient else None
    dh = None if dh is None or ctx.has_recipient else dh.to(ctx.dtype)
    return dh, dw, None, dcols, drows, *(None,) * (INPUTS - 7), token if ctx.has_after else None, unrounded


SHARD_STATS = (_setup_stats, _backward_stats)
