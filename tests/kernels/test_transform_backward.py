"""The tape of a transform: any chain of steps has the derivative that autograd finds for `columns.apply`."""

from __future__ import annotations

import weakref
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusedhead.kernels.transform import pointwise
from fusedhead.kernels.transform.backward import apply_and_record, pull_back, windows_held
from fusedhead.kernels.transform.transform import Step, Transform, apply, parse
from fusedhead.rules.pointwise_codegen import function_of

aten = torch.ops.aten
FUNCTIONS = [
    Step("fn", function_of(op, tuple(args), (), args.index("z")).text)
    for op, *args in (
        (aten.silu.default, "z"), (aten.softplus.default, "z"), (aten.maximum.default, "z", "c1"),
        (aten.logaddexp.default, "r0", "z"), (aten.pow.Tensor_Scalar, "z", 2), (aten.clamp.default, "z", -0.5, 0.7),
    )
]  # fmt: skip
CONSTANT = st.floats(-2, 2, allow_nan=False).filter(lambda c: abs(c) > 0.05)
STEPS = st.one_of(
    st.builds(Step, st.sampled_from(("mul", "add")), CONSTANT),
    st.sampled_from((Step("tanh"), Step("sigmoid"))),
    st.builds(Step, st.sampled_from(("addcol", "mulcol", "addrow", "mulrow")), st.integers(0, 1)),
    st.builds(Step, st.just("round"), st.just("bfloat16")),
    st.sampled_from(FUNCTIONS),
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
    value = leaves[0]
    for step in transform.steps:  # a function's vectors have no gradient
        vectors = [x.detach() for x in leaves[1:]] if step.op == "fn" else leaves[1:]
        value = apply(Transform((step,)), value, *vectors)
    expected = torch.autograd.grad(value, leaves, g, allow_unused=True, materialize_grads=True)
    got, tape = apply_and_record(transform, z, cols, rows, need_cols, need_rows)
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
    got, tape = apply_and_record(parse("mul:2.0 addcol:0 mulrow:1"), z, cols, rows, False, False)
    assert got.data_ptr() == z.data_ptr()
    assert not tape


def test_a_function_reads_back_as_itself_and_knows_its_vectors():
    for step in FUNCTIONS:
        assert pointwise.parse_function(step.value).text == step.value
    assert [list(step.vectors) for step in FUNCTIONS[2:4]] == [[("c", 1)], [("r", 0)]]
    assert list(FUNCTIONS[2].with_column_offset(3).vectors) == [("c", 4)]
    assert FUNCTIONS[3].with_column_offset(3) == FUNCTIONS[3]


@pytest.mark.parametrize("text", ["exp(z);#0", "z|lgamma(z);#0", "z|exp(x);#0"])
def test_what_is_no_function_is_refused(text):
    with pytest.raises(ValueError, match=r"two codes|lgamma|'x'"):
        parse(f"mul:2.0 fn:{text}")


def test_a_function_holds_no_more_windows_than_it_says():
    alive: list[weakref.ref] = []
    most = 0

    def counted(op):
        def run(*args, **over):
            nonlocal most
            result = op(*args, **over)
            alive.append(weakref.ref(result))
            most = max(most, len({id(one()) for one in alive if one() is not None and one().ndim > 0}))
            return result

        return run

    z = torch.randn(4, 4, dtype=torch.float64)
    with mock.patch.object(pointwise, "OPS", {name: counted(op) for name, op in pointwise.OPS.items()}):
        for step in FUNCTIONS:
            most = 0
            code = pointwise.parse_function(step.value).gradient
            pointwise.run(code, z, z[:2], z[:2], z)
            assert most <= pointwise.most_alive(code)
