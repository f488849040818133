"""The code generated for a pointwise op is the op, and its derivative is autograd's, at corners and ties too."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fusedhead.graph.reasons import Escape
from fusedhead.kernels.transform import native as torch_functions
from fusedhead.kernels.transform import pointwise
from fusedhead.rules.pointwise import LISTED
from fusedhead.rules.pointwise_codegen import LARGEST, function_of, slopes_agree

aten = torch.ops.aten
INF, NAN = float("inf"), float("nan")
# where ops have corners: their default bounds, and those below
CORNERS = [-INF, -100.0, -6.0, -3.0, -1.0, -0.5, -0.0, 0.0, 0.1, 0.2, 0.5, 1.0, 3.0, 6.0, 20.0, 100.0, INF, NAN]
ARGUMENTS: dict[Any, list[tuple]] = {
    aten.pow.Tensor_Scalar: [("z", e) for e in (0, 1, 2, 3, 8, -1, -2, 0.5, 1.5, -0.5, -1.5)],
    aten.leaky_relu.default: [("z",), ("z", 0.2)],
    aten.elu.default: [("z",), ("z", 0.5), ("z", 1.0, 2.0, 0.5)],
    aten.softplus.default: [("z",), ("z", 2.0, 1.0)],
    aten.hardtanh.default: [("z",), ("z", -0.5, 0.2)],
    aten.threshold.default: [("z", 0.1, 0.2)],
    aten.clamp.default: [("z", -0.5, 0.5), ("z", None, 1.0), ("z", 0.1)],
    aten.clip.default: [("z", -0.5, 0.5)],
    aten.clamp_min.default: [("z", 0.1)],
    aten.clamp_max.default: [("z", 0.1)],
    aten.clamp.Tensor: [("z", "r0", "c0"), ("z", None, "c0")],
    aten.clamp_min.Tensor: [("z", "c0")],
    aten.clamp_max.Tensor: [("z", "r0")],
    aten.maximum.default: [("z", "c0"), ("r0", "z")],
    aten.minimum.default: [("z", "c0"), ("r0", "z")],
    aten.logaddexp.default: [("z", "c0"), ("r0", "z")],
}
CASES = [
    pytest.param(op, args, kwargs, id=f"{op._schema.name.removeprefix('aten::')}{args[args.index('z') + 1 :]}{kwargs}")
    for table in LISTED
    for op in (*table, *([aten.exp.default] if table is LISTED[0] else []))
    for args in ARGUMENTS.get(op, [("z",)])
    for kwargs in ([{}, {"approximate": "tanh"}] if op is aten.gelu.default else [{}])
]


def operands() -> dict[str, torch.Tensor]:
    z = torch.tensor(CORNERS, dtype=torch.float64)
    z = torch.cat([z, torch.linspace(-7, 7, 46, dtype=torch.float64)]).reshape(8, 8)
    cols = torch.tensor([[-1.0, -0.5, 0.0, 0.1, 0.5, 1.0, 6.0, 3.0]], dtype=torch.float64)
    return {"z": z, "c0": cols, "r0": cols[0, :, None] * 0.5}


@pytest.mark.parametrize(("op", "args", "kwargs"), CASES)
def test_the_code_is_the_op_and_its_derivative(op: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    given = operands()
    z = given["z"].requires_grad_()
    value = op(*(given.get(a, a) if isinstance(a, str) else a for a in args), **kwargs)
    g = torch.linspace(-2, 3, 64, dtype=torch.float64).reshape(8, 8)
    (slope,) = torch.autograd.grad(value, z, g)
    function = function_of(op, args, tuple(kwargs.items()), args.index("z"))
    z, cols, rows = z.detach(), given["c0"], given["r0"].t()
    finite = z.isfinite()
    for way in (function, function._replace(op=None)):  # by kernels of torch's own, where it has them; by its code
        parsed = pointwise.parse_function(way.text)
        found = torch_functions.value(parsed, z, cols, rows)
        torch.testing.assert_close(found, value.detach(), equal_nan=True)
        found = torch_functions.gradient(parsed, g, z, cols, rows)
        torch.testing.assert_close(found[finite], slope[finite], equal_nan=True)


def test_functions_that_torch_has_kernels_for_are_computed_by_them() -> None:
    named = {function.op.op.removesuffix(torch_functions.OPEN) for function in map(generated_by, CASES) if function.op}
    assert named == {name.removesuffix(torch_functions.OPEN) for name in torch_functions.NATIVE}


def test_a_kernel_whose_slope_at_a_corner_is_not_autograd_s_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for function in filter(lambda f: f.op, map(generated_by, CASES)):
        native = torch_functions.NATIVE[function.op.op]
        assert slopes_agree(function.op, function.gradient)
        other = lambda g, z, *a, of=native: of.gradient(g, z, *a).where(z.frac() != 0, 2.0)  # noqa: E731
        monkeypatch.setitem(torch_functions.NATIVE, function.op.op, native._replace(gradient=other))
        assert not slopes_agree(function.op, function.gradient)
        monkeypatch.undo()


def generated_by(case: Any) -> pointwise.Function:
    op, args, kwargs = case.values
    return function_of(op, args, tuple(kwargs.items()), args.index("z"))


@pytest.mark.parametrize(
    ("op", "args"), [(aten.lgamma.default, ("z",)), (aten.pow.Tensor_Scalar, ("z", 0.3)), (aten.atan.default, ("z",))]
)
def test_a_function_that_kernels_do_not_compute_is_an_escape(op: Any, args: tuple) -> None:
    with pytest.raises(Escape, match="not among the functions that a kernel computes"):
        function_of(op, args, (), 0)


def test_no_function_of_torch_is_larger_than_what_a_kernel_takes() -> None:
    functions = [generated_by(case) for case in CASES]
    assert max(len(code.instructions) for function in functions for code in function.codes) < LARGEST
