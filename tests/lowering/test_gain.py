"""The gain of a float16 head: gradients neither vanish nor overflow before the gradient of their loss is known."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusedhead.lowering.gain import MOST_DW, computed, loss_gain


def of(h: torch.Tensor, c_lse: torch.Tensor, c_picked: torch.Tensor) -> tuple[float, float]:
    gain, inverse = loss_gain(computed, h, c_lse, c_picked, None, h.shape[1])
    return gain.item(), inverse.item()


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**31), st.floats(-30, 15), st.floats(-20, 20), st.integers(1, 300), st.sampled_from([0, 1, 2, 5])
)
def test_no_gradient_overflows_and_none_is_smaller_than_it_must_be(seed, size, loss, n, labels) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(seed)
    h = (torch.randn(n, 8) * 2.0**size).clamp(-65504, 65504).half()
    c = torch.rand(n) * 2.0**loss / n
    picked = -torch.rand(n, labels) * 2.0**loss
    gain, inverse = of(h, c, picked)
    assert gain * inverse == 1
    assert torch.tensor(gain).log2().frac() == 0
    size_of_rows = (c + picked.abs().sum(1)).double() * gain
    moved = (h.double().abs() * size_of_rows[:, None]).sum(0).max()
    assert size_of_rows.max() <= 1 + 1e-6
    assert moved <= MOST_DW * (1 + 1e-6)
    assert size_of_rows.max() > 0.49 or moved > MOST_DW * 0.49


def test_a_head_that_is_not_finite_or_has_no_tokens_or_no_coefficient_has_a_finite_gain() -> None:
    h, c = torch.randn(4, 8).half(), torch.full((4,), 0.25)
    for bad in (float("nan"), float("inf")):
        assert of(torch.full_like(h, bad), c, -c[:, None]) == (1, 1)
        assert of(h, c * bad, -c[:, None]) == (1, 1)
    for rows, size in ((h[:0], c[:0]), (h, c * 0)):
        gain, inverse = of(rows, size, -size[:, None])
        assert 0 < gain < float("inf")
        assert gain * inverse == 1


@pytest.mark.parametrize("loss", [1e-25, 1e-7, 1.0, 1e20])
def test_the_gain_follows_the_size_of_the_loss(loss: float) -> None:
    h, c = torch.randn(64, 8).half(), torch.full((64,), 1 / 64)
    usual, _ = of(h, c, -c[:, None])
    scaled, _ = of(h, c * loss, -c[:, None] * loss)
    assert 0.5 <= scaled * loss / usual <= 2
