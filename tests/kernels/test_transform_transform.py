"""A transform is its text, computes what the table of steps says, and knows its own derivative's properties."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fusedhead.kernels.transform.transform import STEPS, Transform, apply, parse

numbers = st.floats(allow_nan=False, allow_infinity=False)
STEP = st.one_of(
    st.sampled_from(["tanh", "sigmoid", "round:bfloat16"]),
    st.builds("{}:{!r}".format, st.sampled_from(["mul", "add"]), numbers),
    st.builds("{}:{}".format, st.sampled_from([op for op, kind in STEPS.items() if kind.axis]), st.integers(0, 3)),
)
CHAIN = st.lists(STEP, max_size=5).map(" ".join)
Z = torch.randn(3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
COLS = torch.rand(4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 0.5
ROWS = torch.rand(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) + 0.5

MEANT = {
    "mul:2.5": lambda z: z * 2.5,
    "add:-1.5": lambda z: z - 1.5,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "addcol:1": lambda z: z + COLS[1],
    "mulcol:2": lambda z: z * COLS[2],
    "addrow:1": lambda z: z + ROWS[1][:, None],
    "mulrow:3": lambda z: z * ROWS[3][:, None],
    "setcol:0": lambda z: COLS[0].expand_as(z),
    "dropcol:0": lambda z: torch.full_like(z, -math.inf),
    "mul:0.1 tanh mul:10.0": lambda z: 10 * torch.tanh(z / 10),
}


@given(CHAIN)
def test_a_chain_is_read_back_from_its_text(text: str) -> None:
    transform = parse(text)
    assert parse(transform.text) == transform


@pytest.mark.parametrize("text", MEANT)
def test_a_step_does_what_the_table_says(text: str) -> None:
    torch.testing.assert_close(apply(parse(text), Z, COLS, ROWS), MEANT[text](Z))


def test_an_unknown_step_is_named() -> None:
    with pytest.raises(ValueError, match="'cosh:1' is not known"):
        parse("mul:2.0 cosh:1")


def test_only_decisions_see_the_rounding() -> None:
    chain = parse("mul:1.0 round:bfloat16")
    assert torch.equal(apply(chain, Z, COLS, ROWS), Z)
    assert torch.equal(apply(chain, Z, COLS, ROWS, decide=True), Z.bfloat16().double())
    assert chain.smooth == parse("mul:1.0")


@given(st.lists(st.builds("mul:{!r}".format, st.floats(-4, 4)), max_size=4).map(" ".join))
def test_a_product_of_constants_is_a_plain_scale(text: str) -> None:
    scale = parse(text).plain_scale
    assert scale is not None
    torch.testing.assert_close(apply(parse(text), Z, COLS, ROWS), Z * scale)


@pytest.mark.parametrize("text", ["tanh", "addcol:0", "mulrow:0", "add:1.0", "dropcol:0"])
def test_anything_more_is_none(text: str) -> None:
    assert parse(text).plain_scale is None


def slope(transform: Transform, z: torch.Tensor) -> torch.Tensor:
    z = z.clone().requires_grad_()
    return torch.autograd.grad(apply(transform, z, COLS, ROWS).sum(), z)[0]


@given(CHAIN)
def test_no_slope_is_steeper_than_the_bound(text: str) -> None:
    transform = parse(text)
    if transform.steepest is not None and math.isfinite(transform.steepest):
        steep = slope(transform, Z).nan_to_num(0.0, 0.0, 0.0).abs().max().item()
        assert steep <= transform.steepest * (1 + 1e-9)


@given(CHAIN)
def test_a_slope_that_does_not_vary_is_one_number_a_row(text: str) -> None:
    transform = parse(text)
    result = slope(transform, Z)
    if transform.factorises and not transform.varies_along_row and result.isfinite().all():
        torch.testing.assert_close(result, result[:, :1].expand_as(result))


@given(CHAIN, st.integers(0, 3))
def test_column_vectors_are_renumbered_and_others_are_not(text: str, columns: int) -> None:
    moved = Transform(tuple(step.with_column_offset(columns) for step in parse(text).steps))
    cols = torch.cat([torch.full((columns, 7), 9.0, dtype=torch.float64), COLS])
    assert torch.equal(apply(moved, Z, cols, ROWS).nan_to_num(), apply(parse(text), Z, COLS, ROWS).nan_to_num())
