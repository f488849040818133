"""The tape of a transform: any chain of steps has the derivative that autograd finds for `columns.apply`."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusedhead.kernels.column_gradients import pull_back, record, windows_held
from fusedhead.kernels.columns import Step, Transform, apply, parse

CONSTANT = st.floats(-2, 2, allow_nan=False).filter(lambda c: abs(c) > 0.05)
STEPS = st.one_of(
    st.builds(Step, st.sampled_from(("mul", "add")), CONSTANT),
    st.sampled_from((Step("tanh"), Step("sigmoid"))),
    st.builds(Step, st.sampled_from(("addcol", "mulcol", "addrow", "mulrow")), st.integers(0, 1)),
    st.builds(Step, st.just("round"), st.just("bfloat16")),
)
CHAINS = st.builds(Transform, st.lists(STEPS, max_size=7).map(tuple))
M, V = 3, 5


def window():
    generator = torch.Generator().manual_seed(1)
    sizes = ((M, V), (2, V), (2, M), (M, V))
    return [torch.randn(s, dtype=torch.float64, generator=generator) for s in sizes]


@settings(max_examples=150, deadline=None)
@given(CHAINS, st.booleans(), st.booleans())
def test_any_chain_has_the_derivative_of_its_definition(transform, need_cols, need_rows):
    z, cols, rows, g = window()
    leaves = [x.clone().requires_grad_() for x in (z, cols, rows)]
    value = apply(transform, *leaves)
    expected = torch.autograd.grad(value, leaves, g, allow_unused=True, materialize_grads=True)
    got, tape = record(transform, z, cols, rows, need_cols, need_rows)
    torch.testing.assert_close(got, value)
    assert len(tape) + 1 == windows_held(transform, need_cols, need_rows)
    dcols = torch.zeros_like(cols) if need_cols else None
    drows = torch.zeros_like(rows) if need_rows else None
    dz = pull_back(transform, g, tape, cols, rows, dcols, drows)
    torch.testing.assert_close(dz, expected[0])
    assert not tape
    if need_cols:
        torch.testing.assert_close(dcols, expected[1])
    if need_rows:
        torch.testing.assert_close(drows, expected[2])


@settings(max_examples=100, deadline=None)
@given(CHAINS)
def test_the_text_of_a_transform_reads_back_as_itself(transform):
    assert parse(transform.text) == transform


def test_a_step_works_in_the_buffer_it_is_given():
    z, cols, rows, _ = window()
    got, tape = record(parse("mul:2.0 addcol:0 mulrow:1"), z, cols, rows, False, False)
    assert got.data_ptr() == z.data_ptr()
    assert not tape
