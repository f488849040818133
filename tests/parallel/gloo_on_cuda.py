"""Gathers and scatters of torch's functional collectives for gloo ranks that share one GPU.

With gloo, waiting for an asynchronous gather of CUDA tensors ends the process (torch 2.11: a segmentation fault, in
`DTensor.full_tensor` too); the blocking collectives work. `serve` puts these in their place, for this process.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

OPERATIONS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}
library = torch.library.Library("_c10d_functional", "IMPL")


def group_of(name: Any) -> Any:
    return _resolve_process_group(name) if isinstance(name, str) else name


def gather(x: Tensor, group_size: int, group_name: Any) -> Tensor:
    gathered = x.new_empty(group_size * x.shape[0], *x.shape[1:])
    dist.all_gather_into_tensor(gathered, x.contiguous(), group_of(group_name))
    return gathered


def scatter(x: Tensor, reduce_op: str, group_size: int, group_name: Any) -> Tensor:
    """The mean of "avg" is taken after the sum: gloo has none."""
    part = x.new_empty(x.shape[0] // group_size, *x.shape[1:])
    operation = OPERATIONS["sum" if reduce_op == "avg" else reduce_op]
    dist.reduce_scatter_tensor(part, x.contiguous(), operation, group_of(group_name))
    return part.div_(group_size) if reduce_op == "avg" else part


def serve(device: str = "CUDA") -> None:
    library.impl("all_gather_into_tensor", gather, device)
    library.impl("reduce_scatter_tensor", scatter, device)
