"""Hidden states whose tokens lie in equal shards on the ranks of a process group, made whole.

    gather_tokens   the whole, from each rank's part; its gradient is summed and scattered
    scatter_tokens  each rank's part of a sum over the ranks, added up in float32

Both take the ``token`` of the collective before them and give one of their own (`lowering.shards`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedhead.kernels.contract import stat_dtype
from fusedhead.lowering.autograd import DIFFERENTIATED_ONCE
from fusedhead.lowering.registration import register_op
from fusedhead.lowering.shard_merge import collective
from fusedhead.lowering.shards import group_of

_ARGUMENTS = "(Tensor x, int dim, int ranks, str group, Tensor? after=None) -> (Tensor whole, Tensor token)"


def _token(x: Tensor) -> Tensor:
    return x.new_zeros(1, dtype=torch.float32)


def _gather_tokens(x: Tensor, dim: int, ranks: int, group: str, after: Tensor | None = None) -> tuple[Tensor, Tensor]:
    part = x.movedim(dim, 0).contiguous()
    whole = part.new_empty((ranks * part.shape[0], *part.shape[1:]))
    collective("all_gather_single", "all_gather_into_tensor")(whole, part, group=group_of(group))
    return whole.movedim(0, dim).contiguous(), _token(x)


def _scatter_tokens(x: Tensor, dim: int, ranks: int, group: str, after: Tensor | None = None) -> tuple[Tensor, Tensor]:
    whole = x.to(stat_dtype(x.dtype)).movedim(dim, 0).contiguous()
    part = whole.new_empty((whole.shape[0] // ranks, *whole.shape[1:]))
    collective("reduce_scatter_single", "reduce_scatter_tensor")(part, whole, group=group_of(group))
    return part.to(x.dtype).movedim(0, dim).contiguous(), _token(x)


def _resized(x: Tensor, dim: int, size: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty([size if d == dim else length for d, length in enumerate(x.shape)]), _token(x)


def _gather_fake(x: Tensor, dim: int, ranks: int, group: str, after: Any = None) -> tuple[Tensor, Tensor]:
    return _resized(x, dim, x.shape[dim] * ranks)


def _scatter_fake(x: Tensor, dim: int, ranks: int, group: str, after: Any = None) -> tuple[Tensor, Tensor]:
    return _resized(x, dim, x.shape[dim] // ranks)


def _setup_gather(ctx: Any, inputs: tuple, output: tuple) -> None:
    _, ctx.dim, ctx.ranks, ctx.group, after = inputs
    ctx.has_after = after is not None
    ctx.set_materialize_grads(False)


def _backward_gather(ctx: Any, d: Tensor | None, after: Tensor | None) -> tuple:
    token = after
    if d is not None:
        d, token = torch.ops.fusedhead.scatter_tokens(d, ctx.dim, ctx.ranks, ctx.group, after)
    return d, None, None, None, token if ctx.has_after else None


_PARTS: dict[str, Any] = {
    "gather_tokens": (_gather_tokens, _gather_fake, (_setup_gather, _backward_gather)),
    "scatter_tokens": (_scatter_tokens, _scatter_fake, DIFFERENTIATED_ONCE),
}
for _name, _functions in _PARTS.items():
    register_op(_name, _ARGUMENTS, *_functions)
