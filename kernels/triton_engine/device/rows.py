"""Shared functions on a row of logits: log-sum-exp in base 2, labels inside a tile, an order on floats.

Sums of exponentials are kept relative to a base-2 reference ``ref2``: total = Σ_v 2^(z·L - ref2) with L the float32
nearest to log2 e, one fused multiply-add and one ex2 an element. `log_sum` turns (ref2, total) into the natural lse
without losing digits when ref2 is large.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusedhead.kernels.triton_engine.constants import INVERSE_L, INVERSE_L_LOW, LN2, NAN_KEY


@triton.jit
def log_sum(ref2, total):
    """lse = ref2 / L + ln total, ref2 finite; 1 / L (not ln 2, L is rounded) is split in two terms."""
    rest = tl.fma(ref2, INVERSE_L_LOW, tl.log2(total) * LN2)
    return tl.fma(ref2, INVERSE_L, rest)


@triton.jit
def rounded_off(ref2, total, lse):
    """What `log_sum` lost when it rounded to lse, to the precision of ln total; 0 where that is not finite."""
    rest = tl.fma(ref2, INVERSE_L_LOW, tl.log2(total) * LN2)
    return finite_or_zero(tl.fma(ref2, INVERSE_L, -lse) + rest)


@triton.jit
def spread_of(total, relative, weight):
    """Σ_v u_v (lse - z) from total = Σ_v 2^x_v, relative = Σ_v u_v x_v and weight = Σ_v u_v, x_v = z_v·L - ref2.

    What all logits share is in no x, so that no digit of the difference is lost to it.
    """
    shared = tl.fma(relative, -INVERSE_L_LOW, tl.log2(total) * LN2 * weight)
    return tl.fma(relative, -INVERSE_L, shared)


@triton.jit
def class_weights(u, col, V, HAS_U: tl.constexpr, WIDTH: tl.constexpr):
    """u_v of the columns ``col`` [WIDTH] of a tile that exist, else 0; u counts as ones unless HAS_U."""
    if HAS_U:
        weight = tl.load(u + col, mask=col < V, other=0.0)
    else:
        weight = tl.where(col < V, 1.0, 0.0)
    return weight


@triton.jit
def weighted_sum(z, weight, col, V):
    """Σ_v u_v z over the columns ``col`` of a tile that exist, whose weights are ``weight``."""
    return tl.sum(tl.where((col < V)[None, :], z * weight[None, :], 0.0), 1)


@triton.jit
def finite_or_zero(x):
    return tl.where(tl.abs(x) < float("inf"), x, 0.0)


@triton.jit
def order_key(z):
    """int32 keys ordered as torch.max orders float32: -0 equals 0, NaN is above everything."""
    bits = (z + 0.0).to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ NAN_KEY, bits)
    return tl.where(z != z, NAN_KEY, key)


@triton.jit
def from_order_key(key):
    return tl.where(key < 0, key ^ NAN_KEY, key).to(tl.float32, bitcast=True)


@triton.jit
def laid_out_as(x, z):
    """x, spread over threads as z. A tile made of vectors alone gets a layout of its own, with 32 rows in a thread:
    where a sum along rows needs them all at once, registers spill (0.5 KB a thread in `sweeps.exponentials`)."""
    return x + tl.minimum(tl.abs(z), 0.0)


@triton.jit
def store_labelled(values, y, sy0, sy1, K, row, N, start, out, LABELS: tl.constexpr, WIDTH: tl.constexpr):
    """out[row, k] = values[row, y[row, k] - start] for the labels that lie in this part of a tile.

    LABELS: 1 one a row, 2 any number K. To be called where the label map says that there is one.
    """
    if LABELS == 1:
        _store_label(values, y, sy0, sy1, K, 0, row, N, start, out, WIDTH)
    elif LABELS == 2:
        for k in range(K):
            _store_label(values, y, sy0, sy1, K, k, row, N, start, out, WIDTH)


@triton.jit
def _store_label(values, y, sy0, sy1, K, k, row, N, start, out, WIDTH: tl.constexpr):
    at = label_position(y, sy0, sy1, k, row, N, start, WIDTH)
    value = tl.sum(tl.where(tl.arange(0, WIDTH)[None, :] == at[:, None], values, 0.0), 1)
    tl.store(out + row.to(tl.int64) * K + k, value, mask=at >= 0)


@triton.jit
def label_position(y, sy0, sy1, k, row, N, start, WIDTH: tl.constexpr):
    """Column of each row's k-th label inside [start, start + WIDTH), int32, -1 for those elsewhere."""
    label = tl.load(y + row.to(tl.int64) * sy0 + k * sy1, mask=row < N, other=-1)
    at = label - start
    return tl.where((at >= 0) & (at < WIDTH), at, -1).to(tl.int32)
