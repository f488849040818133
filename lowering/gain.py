"""The gain of a float16 head whose gradients are computed before the gradient of its loss is known.

    gain = 2^k, k the largest with     gain · max_i a_i <= 1     and     gain · max_d Σ_i a_i |h_id| <= 2^11
    a_i = |c_lse_i| + Σ_k |c_picked_ik| + |c_sum_i| Σ_v |u_v|

`head_loss` is given its coefficients times the gain, and its upstream gradient divided by it, so that dh and dw wait
for the loss scale in the middle of float16's range: as they are, a mean over thousands of tokens makes them so small
that they lose digits or vanish. Since a_i bounds Σ_v |dz_iv| where the transform's slope is at most 1, no |dh| exceeds
the largest |w|, a float16 number. No |dw| exceeds 2^11, and no part of its sum over the tokens 2^15, which the Triton
engine computes times 2^4 and cuBLAS may round to float16. A power of two rounds nothing. What overflows or vanishes
afterwards does so in eager code too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

aten = torch.ops.aten
MOST_DH, MOST_DW = 1.0, 2.0**11
RANGE = 2.0**-100, 2.0**100  # of 1 / gain
EXPONENT = 0x7F800000  # the bits of a float32 that hold its exponent


def computed(op: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The ``call`` of `loss_gain` on tensors."""
    return op(*args, **kwargs)


def loss_gain(call: Callable[..., Any], h: Any, c_lse: Any, c_picked: Any, c_sum: Any, weight: Any) -> tuple[Any, Any]:
    """(gain [], 1 / gain []) float32 of h [N, D] and coefficients c_lse, c_sum [N] and c_picked [N, K], None for zero.

    ``weight``: Σ_v |u_v|, a number or [] float32. ``call`` computes an op of ``torch.ops`` on tensors, or appends it to
    a graph. No host sync: coefficients and h that are not finite give a gain of 1.
    """
    sizes = [] if c_lse is None else [call(aten.abs.default, c_lse)]
    if c_picked is not None:
        sizes.append(call(aten.sum.dim_IntList, call(aten.abs.default, c_picked), [1]))
    if c_sum is not None:
        sizes.append(call(aten.mul.Tensor, call(aten.abs.default, c_sum), weight))
    total = sizes[0]
    for size in sizes[1:]:
        total = call(aten.add.Tensor, total, size)
    wide = call(aten._to_copy.default, call(aten.abs.default, call(aten.detach.default, h)), dtype=torch.float32)
    moved = call(aten.sum.dim_IntList, call(aten.mul.Tensor, wide, call(aten.unsqueeze.default, total, 1)), [0])
    bounds = (_largest(call, total), MOST_DH), (_largest(call, moved), MOST_DW)
    of_h, of_w = (call(aten.div.Tensor, bound, most) for bound, most in bounds)
    least = call(aten.maximum.default, of_h, of_w)
    least = call(aten.clamp.default, call(aten.nan_to_num.default, least, 1.0, 1.0, 1.0), *RANGE)
    bits = call(aten.view.dtype, call(aten.reciprocal.default, least), torch.int32)
    gain = call(aten.view.dtype, call(aten.bitwise_and.Scalar, bits, EXPONENT), torch.float32)
    return gain, call(aten.reciprocal.default, gain)


def times_gain(
    call: Callable[..., Any], h: Any, coefficients: Sequence[Any], u: Any, classes: Any
) -> tuple[list[Any], Any]:
    """(the coefficients of lse, picked and sum times the gain, None for zero, and 1 / gain); see `loss_gain`.

    ``u`` [V]: the weights of the sum over the classes, None where all of the ``classes`` weigh 1.
    """
    c_lse, c_picked, c_sum = coefficients
    weight = classes
    if c_sum is not None and u is not None:
        weight = call(aten.sum.default, call(aten.abs.default, call(aten.detach.default, u)))
    gain, inverse = loss_gain(call, h, c_lse, c_picked, c_sum, weight)
    return [None if c is None else call(aten.mul.Tensor, c, gain) for c in coefficients], inverse


def _largest(call: Callable[..., Any], x: Any) -> Any:
    """The largest of x >= 0, 0 where x is empty."""
    return call(aten.amax.default, call(aten.constant_pad_nd.default, x, [0, 1]), [0])
