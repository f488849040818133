"""The windows of token programs: within the budget, whole on a GPU whatever the batch, never empty."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fusedhead.lowering.plan.problem import MIB
from fusedhead.lowering.plan.tokenwise import row_plan

BF16, F32 = torch.bfloat16, torch.float32
TEACHER = (False, True)  # a frozen head, and one that gets gradients


@pytest.mark.parametrize(
    ("device", "dtype", "memory", "tokens"),
    [("cuda", BF16, 0, 1024), ("cuda", BF16, -1, 128), ("cuda", F32, 0, 640), ("cpu", F32, 0, 16), ("cpu", F32, 16, 3)],
)
def test_what_is_chosen_for_two_heads(device: str, dtype: torch.dtype, memory: int, tokens: int) -> None:
    assert row_plan((4096, 128_256), dtype, device, heads=TEACHER, calls=10, memory=memory).tokens == tokens


@given(
    st.integers(0, 10**6), st.integers(2, 300_000), st.sampled_from([BF16, F32]), st.sampled_from(["cpu", "cuda"]),
    st.lists(st.booleans(), min_size=1, max_size=4), st.integers(2, 60), st.integers(1, 4096),
)  # fmt: skip
def test_a_window_fits_its_budget_or_is_one_token(n, v, dtype, device, heads, calls, memory) -> None:  # type: ignore[no-untyped-def]
    chosen = row_plan((n, v), dtype, device, heads=heads, calls=calls, memory=memory)
    assert chosen.tokens >= 1
    assert chosen.tokens == 1 or chosen.tokens * v * len(heads) * dtype.itemsize <= memory * MIB
    kept = chosen.tokens * v * dtype.itemsize * (len(heads) + (chosen.group - 1) * sum(heads))
    assert chosen.group == 1 or (device == "cuda" and kept <= chosen.predicted_bytes <= memory * MIB)


def test_a_narrow_dw_is_rounded_once() -> None:
    assert row_plan((3072, 128_256), BF16, "cuda", heads=TEACHER, calls=9).narrow_sums  # one group
    assert not row_plan((16384, 128_256), BF16, "cuda", heads=TEACHER, calls=9).narrow_sums
    assert not row_plan((32, 200_000), BF16, "cpu", heads=TEACHER, calls=9).narrow_sums  # two windows
    assert row_plan((10**6, 128_256), F32, "cuda", heads=TEACHER, calls=9).narrow_sums


def test_groups_are_of_one_size() -> None:
    chosen = row_plan((16384, 128_256), BF16, "cuda", heads=TEACHER, calls=9)
    assert (chosen.tokens, chosen.group) == (1024, 4)  # four groups of 16 windows
    assert row_plan((16384, 128_256), BF16, "cuda", heads=(False, False), calls=9).group == 1  # nothing to multiply


def test_what_a_divergence_holds() -> None:
    chosen = row_plan((16384, 128_256), BF16, "cuda", heads=TEACHER, calls=9)
    products, dz, half_of_dw_in_float32 = 2 * chosen.tokens, chosen.group * chosen.tokens, 2048
    assert (products + dz + half_of_dw_in_float32) * 128_256 * 2 <= 2004.1 * MIB


def test_few_logits_on_a_cpu_are_not_worth_a_compilation() -> None:
    assert not row_plan((64, 50_257), F32, "cpu", heads=[True], calls=9).compiled
    assert row_plan((1024, 50_257), F32, "cpu", heads=[True], calls=9).compiled
    assert row_plan((64, 50_257), F32, "cuda", heads=[True], calls=9).compiled
