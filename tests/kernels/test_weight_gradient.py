"""Sums of gradients in float32 that lie half in the gradients themselves."""

from __future__ import annotations

import pytest
import torch

from fusedhead.kernels.narrow_sum import NarrowSum
from fusedhead.kernels.triton_engine.weight_gradient import WeightGradient

CUTS = ([slice(0, 20), slice(20, 33), slice(33, 70)], [slice(0, 70)])


def sums(vocab: int, cuts, accumulate: torch.dtype, start: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(dw over five windows of tokens, the same in float64)."""
    g = torch.Generator().manual_seed(vocab)
    w = torch.empty(vocab, 24, dtype=torch.bfloat16)
    weights, row = torch.randn(vocab, generator=g), torch.randn(24, generator=g)
    truth = torch.outer(weights, row).double() if start else torch.zeros(vocab, 24, dtype=torch.float64)
    dw = WeightGradient(w, 5, accumulate)
    if start:
        dw.start(weights, row)
    for window in range(5):
        z = torch.randn(16, vocab, generator=g).to(torch.bfloat16)
        x = torch.randn(16, 24, generator=g).to(torch.bfloat16)
        truth += z.double().t() @ x.double()
        for v in cuts:
            v = slice(min(v.start, vocab), min(v.stop, vocab))
            dw.add(z[:, v], v, x, first=window == 0)
    return dw.finish(), truth


@pytest.mark.parametrize("vocab", [1, 2, 3, 64, 69, 70])
@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("start", [True, False])
def test_a_float32_sum_is_rounded_once(vocab, cuts, start):
    got, truth = sums(vocab, cuts, torch.float32, start)
    assert got.dtype == torch.bfloat16
    assert got.is_contiguous()
    assert torch.equal(got, truth.float().to(torch.bfloat16)) or (got.double() - truth).abs().max() <= (
        2**-8 * truth.abs().max()
    )
    assert (got.double() - truth).norm() < 2**-8 * truth.norm()


def test_a_sum_in_its_own_dtype_is_rounded_with_every_window():
    got, truth = sums(70, CUTS[0], torch.bfloat16, False)
    wide, _ = sums(70, CUTS[0], torch.float32, False)
    assert (wide.double() - truth).norm() < (got.double() - truth).norm() < 2**-6 * truth.norm()


def test_a_float32_sum_takes_half_its_memory_beside_dw():
    dw = WeightGradient(torch.empty(1000, 8, dtype=torch.bfloat16), 5, torch.float32)
    own, others = (rows for _, rows in dw.sums.parts)
    assert own.data_ptr() == dw.sums.result.data_ptr()
    assert own.numel() == others.numel() == dw.sums.result.numel() // 2


@pytest.mark.parametrize("first", [0, 1, 4, 9])
@pytest.mark.parametrize("rows", [1, 2, 9])
def test_the_rows_of_a_window_may_start_anywhere(first, rows):
    whole = torch.full((20, 3), 7.0, dtype=torch.bfloat16)
    sums = NarrowSum(whole[first : first + rows], torch.float32)
    wanted = torch.randn(rows, 3)
    for at, into in sums.pieces(slice(0, rows)):
        into.copy_(wanted[at])
    assert torch.equal(sums.finish(), wanted.to(torch.bfloat16))
    assert torch.equal(whole[first : first + rows], wanted.to(torch.bfloat16))
    assert (whole[:first] == 7).all()
    assert (whole[first + rows :] == 7).all()
