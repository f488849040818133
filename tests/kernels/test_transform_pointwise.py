"""The code of a pointwise function: its text reads back, names what it does not know, and holds few results at once."""

from __future__ import annotations

import pytest
import torch

from fusedhead.kernels.transform import pointwise
from tests.rules.pointwise_cases import CASES, generated_by

VALUE = "neg(z);exp(#0);add(1.0,#1);div(1.0,#2);#3"
SIGMOID = f"{VALUE}|{VALUE.removesuffix(';#3')};mul(#3,#3);mul(#1,#4);mul(g,#5);#6"


def test_the_text_of_every_generated_function_reads_back() -> None:
    for function in map(generated_by, CASES):
        assert pointwise.parse_function(function.text).text == function.text


def test_a_code_is_run_in_order_on_the_window() -> None:
    function = pointwise.parse_function(SIGMOID)
    z, g, none = torch.randn(3, 4), torch.randn(3, 4), torch.empty(0)
    p = torch.sigmoid(z)
    torch.testing.assert_close(pointwise.run(function.value, z, none, none), p)
    torch.testing.assert_close(pointwise.run(function.gradient, z, none, none, g), g * p * (1 - p))


def test_vectors_lie_along_the_classes_and_along_the_tokens() -> None:
    (code, _) = pointwise.parse_function("mul(z,c0);add(#0,r1);#1|g").codes
    z, cols, rows = torch.randn(3, 4), torch.randn(1, 4), torch.randn(2, 3)
    torch.testing.assert_close(pointwise.run(code, z, cols, rows), z * cols[0] + rows[1][:, None])
    assert list(pointwise.vectors("mul(z,c0);add(#0,r1);#1|g")) == [("c", 0), ("r", 1)]
    assert pointwise.shifted("mul(z,c0);add(#0,r1);#1|g", 2) == "mul(z,c2);add(#0,r1);#1|g"


def test_operands_are_left_as_they_are_though_results_are_written_over() -> None:
    code = pointwise.parse_function("exp(z);neg(#0);mul(#1,z);#2|g").value
    z = torch.randn(2, 5)
    before = z.clone()
    torch.testing.assert_close(pointwise.run(code, z, torch.empty(0), torch.empty(0)), -z.exp() * z)
    assert torch.equal(z, before)


def test_results_that_are_read_no_more_do_not_count() -> None:
    assert pointwise.most_alive(pointwise.parse_function("exp(z);neg(#0);sin(#1);#2|g").value) == 2
    assert pointwise.most_alive(pointwise.parse_function("exp(z);neg(z);sin(z);where(#0,#1,#2);#3|g").value) == 4


@pytest.mark.parametrize(("text", "named"), [("cbrt(z);#0|g", "'cbrt'"), ("exp(z);#0", "two codes around a bar")])
def test_a_text_that_is_no_function_is_named(text: str, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        pointwise.parse_function(text)
