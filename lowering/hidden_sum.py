"""The sum over ranks of the gradient of hidden states, taken before it is rounded.

    hidden_sum   of hidden states x, a ``recipient``: a float32 tensor that stands for them all, which an op in shards
                 takes beside them and gives its gradient to. No collective; the gradient of x is that of the recipient
                 summed over the ranks: whole (``dim`` is -1), or scattered along the dimension of the tokens that
                 `gather_tokens` has gathered.
    sum_parts    that sum, in the dtype that is named

Autograd rounds a gradient to the dtype of its tensor. In two bytes each rank's part of dh would be rounded before the
sum, where one process rounds once. A recipient has float32, and one number in memory: nobody reads it. Both ops take
the ``token`` of the collective before them and give one of their own (`lowering.shards`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fusedhead.kernels.contract import stat_dtype
from fusedhead.lowering.autograd import DIFFERENTIATED_ONCE
from fusedhead.lowering.registration import register_op
from fusedhead.lowering.shard_merge import collective
from fusedhead.lowering.shards import group_of

_PLACE = "int dim, int ranks, str group"
SUM_SCHEMAS = {
    "hidden_sum": f"(Tensor x, {_PLACE}, Tensor? after=None) -> (Tensor recipient, Tensor token)",
    "sum_parts": f"(Tensor part, {_PLACE}, ScalarType dtype, Tensor? after=None) -> (Tensor total, Tensor token)",
}


def _token(x: Tensor) -> Tensor:
    return x.new_zeros(1, dtype=torch.float32)


def _hidden_sum(x: Tensor, dim: int, ranks: int, group: str, after: Tensor | None = None) -> tuple[Tensor, Tensor]:
    sizes = [size * ranks if at == dim else size for at, size in enumerate(x.shape)]
    return x.new_zeros(1, dtype=stat_dtype(x.dtype)).expand(sizes), _token(x)


def _sum_parts(
    part: Tensor, dim: int, ranks: int, group: str, dtype: torch.dtype, after: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    if dim < 0:
        total = part.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group_of(group))
        return total.to(dtype), _token(part)
    whole = part.movedim(dim, 0).contiguous()
    share = whole.new_empty((whole.shape[0] // ranks, *whole.shape[1:]))
    collective("reduce_scatter_single", "reduce_scatter_tensor")(share, whole, group=group_of(group))
    return share.to(dtype).movedim(0, dim).contiguous(), _token(part)


def _sum_fake(
    part: Tensor, dim: int, ranks: int, group: str, dtype: torch.dtype, after: Any = None
) -> tuple[Tensor, Tensor]:
    sizes = [size // ranks if at == dim else size for at, size in enumerate(part.shape)]
    return part.new_empty(sizes, dtype=dtype), _token(part)


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, ctx.dim, ctx.ranks, ctx.group, after = inputs
    ctx.dtype, ctx.has_after = x.dtype, after is not None
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, d: Tensor | None, after: Tensor | None) -> tuple:
    token = after
    if d is not None:
        d, token = torch.ops.fusedhead.sum_parts(d, ctx.dim, ctx.ranks, ctx.group, ctx.dtype, after)
    return d, None, None, None, token if ctx.has_after else None


_PARTS: dict[str, Any] = {
    "hidden_sum": (_hidden_sum, _hidden_sum, (_setup, _backward)),
    "sum_parts": (_sum_parts, _sum_fake, DIFFERENTIATED_ONCE),
}
for _name, _functions in _PARTS.items():
    register_op(_name, SUM_SCHEMAS[_name], *_functions)
