"""Native functions: pointwise functions of the logits that torch has a CPU kernel for, forward and backward.

The generated code of a `pointwise.Function` runs one torch call per instruction (17 for gelu and its derivative). Where
the function names an op of `NATIVE`, torch's own kernel runs instead on a CPU: one pass over the window, and the same
values as eager code. All other functions run their code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fusedhead.kernels.transform.pointwise import Function, run

aten = torch.ops.aten


# Suffix of a clamp whose derivative is 0 exactly on its bounds; without it, 1. Releases of torch differ in this.
OPEN = "_open"


class Native(NamedTuple):
    value: Callable[..., Tensor]  # (z, constants...) -> the function
    gradient: Callable[..., Tensor]  # (g, z, constants...) -> g times the derivative


def _within(g: Tensor, z: Tensor, least: float | None, most: float | None = None) -> Tensor:
    """g where least < z < most, else 0: hardtanh's derivative, which is 0 on the bounds."""
    ends = -torch.inf if least is None else least, torch.inf if most is None else most
    return aten.hardtanh_backward(g, z, *ends)


def _within_or_on(g: Tensor, z: Tensor, least: float | None, most: float | None = None) -> Tensor:
    """g where least <= z <= most, else 0: hardtanh's derivative with each bound moved out to the next float."""
    low, high = (z.new_tensor(end if at is None else at) for at, end in ((least, -torch.inf), (most, torch.inf)))
    low, high = low.nextafter(low - torch.inf), high.nextafter(high + torch.inf)
    return aten.hardtanh_backward(g, z, low.item(), high.item())


def _clamps(suffix: str, gradient: Callable[..., Tensor]) -> dict[str, Native]:
    return {
        f"clamp{suffix}": Native(torch.clamp, gradient),
        f"clip{suffix}": Native(torch.clip, gradient),
        f"clamp_min{suffix}": Native(torch.clamp_min, gradient),
        f"clamp_max{suffix}": Native(torch.clamp_max, lambda g, z, most: gradient(g, z, None, most)),
    }


SELU = (1.6732632423543772848170429916717, 1.0507009873554804934193349852946, 1.0)
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
    **_clamps("", _within_or_on),
    **_clamps(OPEN, _within),
}


def names(op: str) -> Iterator[str]:
    """The entries of `NATIVE` that ``op`` may stand for. They differ in the derivative on the bounds."""
    return (name for name in (op, op + OPEN) if name in NATIVE)


def value(function: Function, z: Tensor, cols: Tensor, rows: Tensor) -> Tensor:
    """The function of z [n, v], as a new tensor; cols [C, v] and rows [R, n] are the vectors that it may read."""
    if function.op is not None and z.device.type == "cpu":
        return NATIVE[function.op.op].value(z, *function.op.args)
    return run(function.value, z, cols, rows)


def gradient(function: Function, g: Tensor, z: Tensor, cols: Tensor, rows: Tensor) -> Tensor:
    """g [n, v] times the function's derivative at z [n, v], as a new tensor."""
    if function.op is not None and z.device.type == "cpu":
        return NATIVE[function.op.op].gradient(g, z, *function.op.args)
    return run(function.gradient, z, cols, rows, g)
