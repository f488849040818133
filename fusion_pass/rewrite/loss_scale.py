"""Loss scales: a float16 head whose gradients are computed in the forward, before the loss is multiplied by its scale.

Its coefficients are multiplied by a gain (`lowering.gain`), and the gradient of its loss is divided by it. A bound of
the gradients gives the gain. There is one for plain logits whose loss does not read the squared lse; other float16
heads compute their gradients in the backward.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from fusedhead.graph.nodes import fake
from fusedhead.ir.builder import Emit, named
from fusedhead.kernels.contract import LINEAR_STATS
from fusedhead.kernels.transform.transform import parse
from fusedhead.lowering.gain import times_gain

aten = torch.ops.aten


def is_float16(call: Node) -> bool:
    return fake(call.args[0]).dtype == torch.float16  # type: ignore[arg-type]


def vanishes(call: Node) -> bool:
    """Whether gradients of a head's call would underflow if they were computed before the loss scale is known."""
    plain = call.target is torch.ops.fusedhead.head_stats.default and not parse(str(call.args[6])).smooth.steps
    return is_float16(call) and not plain


def scaled_coefficients(emit: Emit, call: Node, coefficients: dict[int, Node]) -> tuple[dict[int, Node], Node | None]:
    """Coefficients times the gain, and what the gradient of the loss is multiplied by; as they are if not float16."""
    if not is_float16(call) or not coefficients:
        return coefficients, None
    h, w, _, _, _, u = call.args[:6]
    by_statistic = [coefficients.get(at) for at in range(len(LINEAR_STATS))]
    weights = u if fake(u).numel() else None  # type: ignore[arg-type]
    scaled, inverse = times_gain(emit, h, by_statistic, weights, emit.sizes(w)[0])  # type: ignore[arg-type]
    return {at: c for at, c in enumerate(scaled) if c is not None}, named(inverse, "inverse_gain")


def divided(emit: Emit, tie: Node, inverse: Node | None) -> Node:
    """The tie of a head, whose gradient is divided by the gain."""
    return tie if inverse is None else emit(aten.mul.Tensor, tie, inverse)
