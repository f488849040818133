"""Functions of the logits that torch computes in one call, forward and backward, on a CPU.

The code of a `pointwise.Function` is one call an instruction: a gelu and its derivative are 17, a relu's are
selections, which branch element by element. Where the function names an op of the table, that op's own kernel runs
instead: the values are those of eager code. Whatever is not in the table runs its code. It must not know windows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fusedhead.kernels.pointwise import Function, run

aten = torch.ops.aten


class Native(NamedTuple):
    value: Callable[..., Tensor]  # of z and the constants
    gradient: Callable[..., Tensor]  # of g, z and the constants


def _clamp_gradient(g: Tensor, z: Tensor, least: float | None, most: float | None) -> Tensor:
    """g within the bounds and on them, where a hardtanh has no slope: its bounds are the numbers next to these."""
    low, high = (z.new_tensor(end if at is None else at) for at, end in ((least, -torch.inf), (most, torch.inf)))
    low, high = low.nextafter(low - torch.inf), high.nextafter(high + torch.inf)
    return aten.hardtanh_backward(g, z, low.item(), high.item())


SELU = (1.6732632423543772848170429916717, 1.0507009873554804934193349852946, 1.0)
CLAMP = Native(torch.clamp, _clamp_gradient)
NATIVE: Mapping[str, Native] = {
    "relu": Native(aten.relu, lambda g, z: aten.threshold_backward(g, z, 0)),
    "relu6": Native(aten.relu6, lambda g, z: aten.hardtanh_backward(g, z, 0, 6)),
    "threshold": Native(aten.threshold, lambda g, z, at, _: aten.threshold_backward(g, z, at)),
    "leaky_relu": Native(aten.leaky_relu, lambda g, z, slope: aten.leaky_relu_backward(g, z, slope, False)),
    "elu": Native(aten.elu, lambda g, z, *constants: aten.elu_backward(g, *constants, False, z)),
    "celu": Native(aten.celu, lambda g, z, alpha: aten.elu_backward(g, alpha, 1, 1 / alpha, False, z)),
    "selu": Native(aten.selu, lambda g, z: aten.elu_backward(g, *SELU, False, z)),
    "silu": Native(aten.silu, aten.silu_backward),
    "gelu": Native(
        lambda z, how: aten.gelu(z, approximate=how), lambda g, z, how: aten.gelu_backward(g, z, approximate=how)
    ),
    "softplus": Native(aten.softplus, aten.softplus_backward),
    "hardtanh": Native(aten.hardtanh, aten.hardtanh_backward),
    "hardsigmoid": Native(aten.hardsigmoid, aten.hardsigmoid_backward),
    "hardswish": Native(aten.hardswish, aten.hardswish_backward),
    "clamp": CLAMP,
    "clip": CLAMP,
    "clamp_min": Native(torch.clamp_min, lambda g, z, least: _clamp_gradient(g, z, least, None)),
    "clamp_max": Native(torch.clamp_max, lambda g, z, most: _clamp_gradient(g, z, None, most)),
}


def value(function: Function, z: Tensor, cols: Tensor, rows: Tensor) -> Tensor:
    """The function of z [n, v], out of place; cols [C, v], rows [R, n]."""
    if function.op is not None and z.device.type == "cpu":
        return NATIVE[function.op.op].value(z, *function.op.args)
    return run(function.value, z, cols, rows)


def gradient(function: Function, g: Tensor, z: Tensor, cols: Tensor, rows: Tensor) -> Tensor:
    """The gradient with respect to z for a gradient g [n, v] of the function, out of place."""
    if function.op is not None and z.device.type == "cpu":
        return NATIVE[function.op.op].gradient(g, z, *function.op.args)
    return run(function.gradient, z, cols, rows, g)
