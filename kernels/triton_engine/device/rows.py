"""Row functions that kernels share: log-sum-exp in base 2, labels inside a tile, an order on floats.

A sum of exponentials is kept relative to a base-2 reference ``ref2``: total = Σ_v 2^(z·L - ref2), L the float32 nearest
to log2 e. This costs one fused multiply-add and one ex2 an element. `log_sum` turns (ref2, total) into the natural lse
and loses no digits when ref2 is large.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusedhead.kernels.triton_engine.constants import INVERSE_L, INVERSE_L_LOW, LN2, NAN_KEY


@triton.jit
def log_sum(ref2, total):
    """lse = ref2 / L + ln total for a finite ref2. 1 / L is a sum of two terms, and not ln 2, since L is rounded."""
    rest = tl.fma(ref2, INVERSE_L_LOW, tl.log2(total) * LN2)
    return tl.fma(ref2, INVERSE_L, rest)


@triton.jit
def rounded_off(ref2, total, lse):
    """The rounding error of `log_sum`: exact lse - lse, to the precision of ln total; 0 where it is not finite."""
    rest = tl.fma(ref2, INVERSE_L_LOW, tl.log2(total) * LN2)
    return finite_or_zero(tl.fma(ref2, INVERSE_L, -lse) + rest)


@triton.jit
def spread_of(total, relative, weight):
    """Σ_v u_v (lse - z_v) from total = Σ_v 2^x_v, relative = Σ_v u_v x_v and weight = Σ_v u_v, x_v = z_v·L - ref2.

    The x_v are relative to ref2, so that an offset that all logits share does not cost the difference its digits.
    """
    shared = tl.fma(relative, -INVERSE_L_LOW, tl.log2(total) * LN2 * weight)
    return tl.fma(relative, -INVERSE_L, shared)


@triton.jit
def class_weights(u, col, V, HAS_U: tl.constexpr, WIDTH: tl.constexpr):
    """u_v of the columns ``col`` [WIDTH] of a tile, 0 for columns past V. Without HAS_U u is all ones."""
    if HAS_U:
        weight = tl.load(u + col, mask=col < V, other=0.0)
    else:
        weight = tl.where(col < V, 1.0, 0.0)
    return weight


@triton.jit
def weighted_sum(z, weight, col, V):
    """Σ_v u_v z_v over the columns ``col`` < V of a tile; ``weight`` holds their u_v."""
    return tl.sum(tl.where((col < V)[None, :], z * weight[None, :], 0.0), 1)


@triton.jit
def finite_or_zero(x):
    return tl.where(tl.abs(x) < float("inf"), x, 0.0)


@triton.jit
def order_key(z):
    """int32 keys in the order that torch.max has for float32: -0 equals 0, NaN is the largest."""
    bits = (z + 0.0).to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ NAN_KEY, bits)
    return tl.where(z != z, NAN_KEY, key)


@triton.jit
def from_order_key(key):
    return tl.where(key < 0, key ^ NAN_KEY, key).to(tl.float32, bitcast=True)


@triton.jit
def laid_out_as(x, z):
    """x in the layout of z. A tile that is computed from vectors alone gets another layout, with 32 rows a thread,
    and a sum along rows then spills registers (0.5 KB a thread in `sweeps.exponentials`)."""
    return x + tl.minimum(tl.abs(z), 0.0)


@triton.jit
def store_labelled(values, y, sy0, sy1, K, row, N, start, out, LABELS: tl.constexpr, WIDTH: tl.constexpr):
    """out[row, k] = values[row, y[row, k] - start] for the labels that lie in this part of a tile.

    LABELS: 1 for one label a row, 2 for any number K. Called only for parts that hold a label by the label map.
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
    """The k-th label of each row, counted from ``start``, int32; -1 for a label outside [start, start + WIDTH)."""
    label = tl.load(y + row.to(tl.int64) * sy0 + k * sy1, mask=row < N, other=-1)
    at = label - start
    return tl.where((at >= 0) & (at < WIDTH), at, -1).to(tl.int32)
