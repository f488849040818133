"""The code generated for a pointwise op is the op, and its derivative is autograd's, at corners and ties too."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fusedhead.graph.reasons import Escape
from fusedhead.kernels.transform import native as torch_functions
from fusedhead.kernels.transform import pointwise
from fusedhead.rules.pointwise_codegen import LARGEST, function_of
from tests.rules.pointwise_cases import CASES, aten, generated_by

INF, NAN = float("inf"), float("nan")


# where ops have corners: their default bounds, and those below
CORNERS = [-INF, -100.0, -6.0, -3.0, -1.0, -0.5, -0.0, 0.0, 0.1, 0.2, 0.5, 1.0, 3.0, 6.0, 20.0, 100.0, INF, NAN]


def operands() -> dict[str, torch.Tensor]:
    z = torch.tensor(CORNERS, dtype=torch.float64)
    z = torch.cat([z, torch.linspace(-7, 7, 46, dtype=torch.float64)]).reshape(8, 8)
    cols = torch.tensor([[-1.0, -0.5, 0.0, 0.1, 0.5, 1.0, 6.0, 3.0]], dtype=torch.float64)
    return {"z": z, "c0": cols, "r0": cols[0, :, None] * 0.5}


@pytest.mark.parametrize(("op", "args", "kwargs"), CASES)
def test_the_code_is_the_op_and_its_derivative(op: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    inputs = operands()
    z = inputs["z"].requires_grad_()
    value = op(*(inputs.get(a, a) if isinstance(a, str) else a for a in args), **kwargs)
    g = torch.linspace(-2, 3, 64, dtype=torch.float64).reshape(8, 8)
    (slope,) = torch.autograd.grad(value, z, g)
    function = function_of(op, args, tuple(kwargs.items()), args.index("z"))
    z, cols, rows = z.detach(), inputs["c0"], inputs["r0"].t()
    finite = z.isfinite()
    for way in (function, function._replace(op=None)):  # by kernels of torch's own, where it has them; by its code
        parsed = pointwise.parse_function(way.text)
        result = torch_functions.value(parsed, z, cols, rows)
        torch.testing.assert_close(result, value.detach(), equal_nan=True)
        result = torch_functions.gradient(parsed, g, z, cols, rows)
        torch.testing.assert_close(result[finite], slope[finite], equal_nan=True)


@pytest.mark.parametrize(
    ("op", "args"), [(aten.lgamma.default, ("z",)), (aten.pow.Tensor_Scalar, ("z", 0.3)), (aten.atan.default, ("z",))]
)
def test_a_function_that_kernels_do_not_compute_is_an_escape(op: Any, args: tuple) -> None:
    with pytest.raises(Escape, match="not among the functions that a kernel computes"):
        function_of(op, args, (), 0)


def test_no_function_of_torch_is_larger_than_what_a_kernel_takes() -> None:
    functions = [generated_by(case) for case in CASES]
    assert max(len(code.instructions) for function in functions for code in function.codes) < LARGEST
