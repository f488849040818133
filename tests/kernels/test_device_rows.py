"""Row functions inside kernels: the order of floats, and a log-sum-exp that keeps its digits."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is published for Linux only")
if torch.cuda.is_available():
    pytest.skip("kernels are compiled here, not interpreted: benchmarks/gpu_check.py", allow_module_level=True)

import triton
import triton.language as tl

from fusedhead.kernels.triton_engine.device import rows

# numpy speaks up where a GPU stays silent (log2 0, inf - inf)
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")
SIZE = 16


@triton.jit
def _keys(x, keys, back, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    key = rows.order_key(tl.load(x + at))
    tl.store(keys + at, key)
    tl.store(back + at, rows.from_order_key(key))


@triton.jit
def _log_sums(ref2, total, lse, low, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    r, t = tl.load(ref2 + at), tl.load(total + at)
    result = rows.log_sum(r, t)
    tl.store(lse + at, result)
    tl.store(low + at, rows.rounded_off(r, t, result))


def test_keys_order_floats_as_torch_max_does() -> None:
    inf, nan = torch.inf, torch.nan
    x = torch.tensor([nan, inf, 3.5, 1.0, 1e-45, 0.0, -0.0, -1e-45, -1.0, -3.5, -inf, 2.0, -2.0, 1e38, -1e38, 7.0])
    keys, back = torch.empty(SIZE, dtype=torch.int32), torch.empty(SIZE)
    _keys[(1,)](x, keys, back, SIZE)
    assert torch.equal(back.nan_to_num(), (x + 0.0).nan_to_num())
    for i in range(SIZE):
        for j in range(SIZE):
            larger = torch.stack([x[i], x[j]]).max()
            if not torch.isnan(x[i]) and not torch.isnan(x[j]):
                assert bool(keys[i] > keys[j]) == bool(x[i] > x[j])
            else:
                assert torch.isnan(larger)
    assert keys.argmax() == 0  # NaN
    assert keys[5] == keys[6]  # -0 is 0


def test_a_log_sum_keeps_its_digits_where_the_reference_is_large() -> None:
    ref2, total = torch.linspace(-3e4, 3e4, SIZE), torch.linspace(0.5, 5e4, SIZE)
    lse, low = torch.empty(SIZE), torch.empty(SIZE)
    _log_sums[(1,)](ref2, total, lse, low, SIZE)
    exponent = torch.tensor(1.4426950408889634).double()  # log2 e as kernels round it
    exact = ref2.double() / exponent + total.double().log()
    unit = torch.nextafter(lse, torch.tensor(torch.inf)).double() - lse.double()
    assert ((lse.double() - exact).abs() <= 0.51 * unit).all()
    assert ((lse.double() + low.double() - exact).abs() <= 1e-6).all()  # to the precision of ln total


def test_what_is_not_finite_has_no_rounding_error() -> None:
    ref2, total = torch.zeros(SIZE), torch.full((SIZE,), torch.inf)
    lse, low = torch.empty(SIZE), torch.empty(SIZE)
    _log_sums[(1,)](ref2, total, lse, low, SIZE)
    assert lse.isposinf().all()
    assert torch.equal(low, torch.zeros(SIZE))
