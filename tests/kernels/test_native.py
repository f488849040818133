"""Native functions: torch's own kernels compute the functions of the table, unless they differ at a corner."""

from __future__ import annotations

import pytest

from fusedhead.kernels.transform import native as torch_functions
from fusedhead.rules.pointwise_codegen import slopes_agree
from tests.rules.pointwise_cases import CASES, generated_by


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
