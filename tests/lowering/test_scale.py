"""Scaling in place: several gradients by one factor, on every way to it."""

from __future__ import annotations

import pytest
import torch

from fusedhead.lowering import scale

ops = torch.ops.fusedhead


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("g", [1.0, 0.5, float("nan")])
def test_every_tensor_is_scaled_and_rounded_once(dtype, g):
    xs = [torch.randn(6, 4, dtype=dtype), torch.randn(4, 6, dtype=dtype).t(), torch.empty(0, dtype=dtype)]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    expected = [(x.to(wide) * g).to(dtype) for x in xs]
    copies = [ops.scale(x, torch.tensor(g)) for x in xs]
    ops.scale_(xs, torch.tensor(g))
    for got in (xs, copies):
        for a, b in zip(got, expected):
            assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


def test_nothing_to_scale_is_no_error():
    assert scale._in_place([], torch.ones(())) is None
