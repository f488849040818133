"""Surroundings of an eager projection: active modes and the owner of the weight decide whether it may be deferred.

| what                                                                  | why it is then computed at once |
|-----------------------------------------------------------------------|-----------------------------------------------|
| a mode that sees functions or ops, a transform of ``torch.func``      | it gives the call a meaning of its own |
| a tracer, a compiler                                                  | it records the call |
| a region of checkpointing                                             | both passes over it have to save the same |
| operands of another class, layout, dtype or device than plain tensors | their class says what the call is |
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedhead.compat import (
    DeviceContext,
    dispatch_modes,
    function_modes,
    function_transform_level,
    torch_function_enabled,
)
from fusedhead.deferred.surroundings import checkpoint
from fusedhead.functional.eager_products import EagerProducts

LINEAR = F.linear
HEAD_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def plainly_eager() -> bool:
    """Whether nothing that is active here sees, records or changes single calls of torch."""
    return not (
        torch.compiler.is_compiling()
        or F.linear is not LINEAR
        or not torch_function_enabled()
        or any(type(mode) not in (DeviceContext, EagerProducts) for mode in function_modes())
        or dispatch_modes()
        or function_transform_level() is not None
        or checkpoint() is not None
    )


def of_plain_tensors(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the operands are ordinary tensors [..., D], [V, D], [V] that fit together."""
    if type(input) is not Tensor or not all(type(x) in (Tensor, nn.Parameter) for x in (weight, bias) if x is not None):
        return False
    if weight.ndim != 2 or input.ndim < 2 or input.shape[-1] != weight.shape[1] or weight.dtype not in HEAD_DTYPES:
        return False
    if bias is not None and bias.shape != weight.shape[:1]:
        return False
    operands = [x for x in (input, bias) if x is not None]
    autocast = torch.is_autocast_enabled(weight.device.type)
    return (
        weight.device.type != "meta"
        and all(x.device == weight.device and x.layout is torch.strided for x in (weight, *operands))
        and all(x.dtype in HEAD_DTYPES if autocast else x.dtype == weight.dtype for x in operands)
        and not any(x.is_inference() and torch.is_grad_enabled() for x in (weight, *operands))
    )
