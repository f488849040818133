"""Heads and float64 truths for kernels that run in Triton's interpreter on the CPU (see tests/conftest.py).

The interpreter's bfloat16 products are wrong, so bfloat16 and everything about speed is checked on a GPU
(benchmarks/gpu_check.py). Sizes are a few tiles of the CPU row of the tile table.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is published for Linux only")
if torch.cuda.is_available():
    pytest.skip("kernels are compiled here, not interpreted: benchmarks/gpu_check.py", allow_module_level=True)

from fusedhead.kernels import reference
from fusedhead.kernels.contract import Head, Needs, RowGrads, RowStats
from fusedhead.kernels.transform.transform import parse
from fusedhead.rules.pointwise_codegen import function_of

F32 = torch.float32
ALL = Needs(True, True, True, True)
OPERANDS = Needs(True, True, False, False)
STEPS = 8e-7  # relative error allowed to float32: a few roundings
EACH_STEP = "mul:0.5 addcol:0 mulcol:1 tanh mul:3.0 addrow:0 mulrow:1 sigmoid add:0.25 mul:6.0"


def fn(op, *args) -> str:
    """The step of a pointwise op; its operands are "z", "c0", "r1" or numbers."""
    return f"fn:{function_of(op, args, (), args.index('z')).text}"


aten = torch.ops.aten
CURVED = f"mul:0.5 {fn(aten.silu.default, 'z')} addcol:0 {fn(aten.mish.default, 'z')} mulrow:1"
# every op that a function is made of, somewhere they are defined
FUNCTIONS = {
    name: f"{before} {fn(op, *args)} {after}".strip()
    for name, before, op, args, after in (
        ("relu", "", aten.relu.default, ("z",), ""),
        ("gelu", "", aten.gelu.default, ("z",), "mul:2.0"),
        ("mish", "", aten.mish.default, ("z",), ""),
        ("softplus", "mul:12.0", aten.softplus.default, ("z",), ""),
        ("elu", "", aten.elu.default, ("z",), "addcol:0"),
        ("hardswish", "", aten.hardswish.default, ("z",), ""),
        ("log_sigmoid", "", aten.log_sigmoid.default, ("z",), ""),
        ("clamp", "", aten.clamp.default, ("z", -1.0, 1.0), "mul:3.0"),
        ("threshold", "", aten.threshold.default, ("z", 0.1, 0.2), ""),
        ("maximum", "", aten.maximum.default, ("z", "c1"), ""),
        ("minimum", "", aten.minimum.default, ("r0", "z"), ""),
        ("logaddexp", "", aten.logaddexp.default, ("c0", "z"), ""),
        ("abs", "", aten.abs.default, ("z",), ""),
        ("pow", "", aten.pow.Tensor_Scalar, ("z", 3), ""),
        ("power of a root", "sigmoid", aten.pow.Tensor_Scalar, ("z", -1.5), ""),
        ("sqrt", "sigmoid", aten.sqrt.default, ("z",), "mul:5.0"),
        ("rsqrt", "sigmoid", aten.rsqrt.default, ("z",), ""),
        ("reciprocal", "sigmoid add:0.5", aten.reciprocal.default, ("z",), ""),
        ("log", "sigmoid", aten.log.default, ("z",), ""),
        ("log2", "sigmoid", aten.log2.default, ("z",), ""),
        ("log1p", "sigmoid mul:0.9", aten.log1p.default, ("z",), ""),
        ("exp", "", aten.exp.default, ("z",), "mul:0.1"),
        ("exp2", "", aten.exp2.default, ("z",), "mul:0.1"),
        ("expm1", "", aten.expm1.default, ("z",), "mul:0.1"),
        ("sin", "", aten.sin.default, ("z",), ""),
        ("cos", "", aten.cos.default, ("z",), "mul:4.0"),
        ("erf", "", aten.erf.default, ("z",), ""),
    )
}  # fmt: skip


def head(n=20, v=70, d=16, k=1, transform="", dtype=F32, seed=0, weighted=False, scale=2.0) -> Head:
    g = torch.Generator().manual_seed(seed)
    h = torch.randn(n, d, generator=g).to(dtype)
    w = (torch.randn(v, d, generator=g) * scale / d**0.5).to(dtype)
    y = torch.randint(0, v, (n, k), generator=g)
    cols = torch.randn(2, v, generator=g)
    rows = torch.rand(2, n, generator=g) + 0.5
    u = torch.rand(v, generator=g) if weighted else torch.empty(0)
    return Head(h, w, y, cols, rows, u, parse(transform))


def doubled(x: Head) -> Head:
    h, w, cols, rows = (t.double().requires_grad_() for t in (x.h, x.w, x.cols, x.rows))
    return Head(h, w, x.y, cols, rows, x.u.double(), x.transform)


def truth(x: Head, g: RowGrads):
    wide = doubled(x)
    stats = reference.row_stats(wide)
    loss = torch.zeros((), dtype=torch.float64)
    for name in ("lse", "picked", "sum", "entropy", "variance"):
        if getattr(g, name) is not None:
            loss = loss + (getattr(g, name).double() * getattr(stats, name)).sum()
    if g.square is not None:
        loss = loss + (g.square.double() * stats.lse**2).sum()
    operands = (wide.h, wide.w, wide.cols, wide.rows)
    grads = torch.autograd.grad(loss, operands, allow_unused=True, materialize_grads=True)
    return RowStats(*(None if s is None else s.detach() for s in stats)), grads


def error(got: torch.Tensor, true: torch.Tensor) -> float:
    assert got.shape == true.shape
    return float((got.double() - true.double()).norm() / true.double().norm().clamp_min(1e-300))


def gradients(n: int, k: int = 1, seed: int = 1, **more: bool) -> RowGrads:
    g = torch.Generator().manual_seed(seed)
    lse, entropy, total, square = (torch.rand(n, generator=g) + 0.1 for _ in range(4))
    picked = -torch.rand(n, k, generator=g) - 0.1
    return RowGrads(
        lse=lse if more.get("lse", True) else None,
        picked=picked if k else None,
        sum=0.1 * total if more.get("sum") else None,
        entropy=entropy if more.get("entropy") else None,
        square=0.1 * square if more.get("square") else None,
        variance=torch.rand(n, generator=g) if more.get("variance") else None,
    )
