"""The sink of a sweep's gradients: windows and blocks add up to dh, dw and the gradient of a bias."""

from __future__ import annotations

import pytest
import torch

from fusedhead.kernels.contract import Needs, RowGrads, Windows
from fusedhead.kernels.torch_engine.blocks import cuts
from fusedhead.kernels.torch_engine.gradient_sink import Sink, accumulate_product
from fusedhead.lowering.checks import head_of
from tests.lowering.heads import operands

N, V, D = 20, 30, 8


@pytest.mark.parametrize("needs", [Needs(True, True, True, False), Needs(True, False, False, False)])
@pytest.mark.parametrize("summed", [False, True])
def test_windows_and_blocks_add_up(needs: Needs, summed: bool) -> None:
    torch.manual_seed(0)
    chain = "mul:2.0" if summed else "mul:2.0 addcol:0"
    needs = needs._replace(cols=needs.cols and not summed)
    o = operands(N, V, D, 2)
    head = head_of(o, chain)
    g_sum = torch.rand(N, dtype=head.h.dtype) if summed else None
    sink = Sink(head, RowGrads(sum=g_sum), needs, Windows(7, V, head.h.dtype))
    e = torch.rand(N, V, dtype=head.h.dtype)
    s, t = torch.rand(N, dtype=e.dtype), torch.randn(N, 2, dtype=e.dtype)
    for i in cuts(N, 7):
        product = torch.zeros(len(head.h[i]), D, dtype=e.dtype)
        for v in cuts(V, 11):
            sink.block(i, v, e[i, v], s[i, None] * head.h[i], s[i])
            accumulate_product(product, e[i, v], head.w[v])
        sink.labels(i, t[i])
        sink.hidden(i, product, s[i], t[i])
    grads = sink.finish()
    dz = (s[:, None] * e).scatter_add(1, head.y, t)
    if g_sum is not None:
        dz = dz + 2 * g_sum[:, None] * head.u
    torch.testing.assert_close(grads.h, dz @ head.w)
    assert (grads.w is not None) == needs.w
    if grads.w is not None:
        torch.testing.assert_close(grads.w, dz.T @ head.h)
    if needs.cols:
        assert grads.cols is not None
        torch.testing.assert_close(grads.cols[0], dz.sum(0) / 2)  # the bias stands behind a factor of 2


def test_a_product_of_two_bytes_is_added_to_a_wide_sum() -> None:
    into, e, w = torch.ones(3, 4), torch.rand(3, 5).bfloat16(), torch.rand(5, 4).bfloat16()
    expected = 1 + (e @ w).float()
    accumulate_product(into, e, w)
    torch.testing.assert_close(into, expected)
