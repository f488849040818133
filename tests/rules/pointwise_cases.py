"""The pointwise ops with a listed rule, and arguments for each, as cases for tests."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fusedhead.kernels.transform import pointwise
from fusedhead.rules.pointwise import LISTED
from fusedhead.rules.pointwise_codegen import function_of

aten = torch.ops.aten

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


def generated_by(case: Any) -> pointwise.Function:
    op, args, kwargs = case.values
    return function_of(op, args, tuple(kwargs.items()), args.index("z"))
