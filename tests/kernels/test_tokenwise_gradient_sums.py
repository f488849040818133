"""Sums of gradients over windows are rounded once."""

from __future__ import annotations

import pytest
import torch

from fusedhead.kernels.tokenwise import engine as tokenwise_engine
from fusedhead.kernels.tokenwise import gradient_sums
from fusedhead.kernels.tokenwise.program import read
from tests.lowering.divergence import D, V


@pytest.mark.parametrize("group", [1, 2, 3, 8])
def test_dw_of_many_windows_is_rounded_once(group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where products add to float32 sums, as on a GPU. Tokens are alike, so that dw grows window by window: rounding
    the sums on the way would cost up to twice.
    """
    monkeypatch.setattr(gradient_sums, "adds_in_epilogue", lambda device: True)
    torch.manual_seed(0)
    n = 48
    program = read("v0 = head(r0, t1, t2, r3, '', bfloat16); return v0")
    h, dz = ((torch.randn(1, size) + 0.1 * torch.randn(n, size)).bfloat16() for size in (D, V))
    tensors = [h, torch.randn(V, D).bfloat16(), torch.empty(0, V), torch.empty(n, 0)]
    truth = dz.double().t() @ h.double()

    def wrong(tokens: int, narrow: bool, group: int) -> float:
        needs = [False, True, False, False]
        dw = tokenwise_engine.head_rows_backward(program, [dz], tensors, needs, tokens, False, narrow, group)[1]
        assert dw is not None
        assert dw.dtype == torch.bfloat16
        return (dw - truth).norm().item()

    once = wrong(n, True, 1)
    assert wrong(4, False, group) <= 1.001 * once
    assert wrong(4, True, 1) > 1.3 * once  # sums in bfloat16
