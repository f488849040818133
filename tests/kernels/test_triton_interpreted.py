"""The Triton engine against float64, on the CPU: kernels run in Triton's interpreter (see tests/conftest.py).

The interpreter's bfloat16 products are wrong, so bfloat16 and everything about speed is checked on a GPU
(benchmarks/gpu_check.py). Sizes are a few tiles of the CPU row of the tile table.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is published for Linux only")
if torch.cuda.is_available():
    pytest.skip("kernels are compiled here, not interpreted: benchmarks/gpu_check.py", allow_module_level=True)

import triton
import triton.language as tl

from benchmarks.measure import cpu_allocations, peak_of
from fusedhead.kernels import reference
from fusedhead.kernels.contract import STATS, Head, Needs, RowGrads, RowStats, Windows
from fusedhead.kernels.transform import pointwise
from fusedhead.kernels.transform.transform import parse
from fusedhead.kernels.triton_engine import engine, single_pass
from fusedhead.kernels.triton_engine import windows as triton_operands
from fusedhead.kernels.triton_engine.device.schedule import locate, partial_offset, schedule, step_counts
from fusedhead.kernels.triton_engine.launch import sweep
from fusedhead.kernels.triton_engine.launch import tiles as triton_tiles
from fusedhead.kernels.triton_engine.sweeps import statistics
from fusedhead.rules.pointwise_codegen import function_of

# numpy speaks up where a GPU stays silent (log2 0, inf - inf)
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")
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


@pytest.mark.parametrize("transform", ["", "mul:0.5 addcol:1", EACH_STEP, CURVED])
def test_every_statistic_matches_float64(transform):
    x = head(n=37, v=101, d=24, k=2, transform=transform, weighted=True)
    got = engine.head_stats(x, frozenset(STATS), Windows(16, 32, F32))
    true, _ = truth(x, gradients(37, 2))
    for name in ("lse", "picked", "sum", "entropy", "variance", "max"):
        assert error(getattr(got, name), getattr(true, name)) < STEPS, name
    assert torch.equal(got.argmax, true.argmax)


@pytest.mark.parametrize("n", [1, 7, 16, 50])
@pytest.mark.parametrize("v", [1, 33, 64])
def test_every_size_is_covered(n, v):
    x = head(n=n, v=v)
    got = engine.head_stats(x, frozenset(STATS), Windows(n, v, F32))
    true, _ = truth(x, gradients(n))
    assert error(got.lse, true.lse) < STEPS
    assert error(got.picked, true.picked) < STEPS
    assert torch.equal(got.argmax, true.argmax)


@pytest.mark.parametrize("transform", ["", "addcol:0 mulrow:1", EACH_STEP, CURVED])
@pytest.mark.parametrize(("windows", "entropy"), [(Windows(64, 128, F32), True), (Windows(16, 32, F32), False)])
def test_gradients_for_any_upstream_match_float64(transform, windows, entropy):
    x = head(n=20, v=70, k=2, transform=transform, weighted=True)
    g = gradients(20, 2, sum=True, entropy=entropy, variance=True)
    stats = engine.head_stats(x, frozenset({"lse", "entropy", "variance"}), windows)
    got = engine.head_stats_backward(x, g, stats, ALL, windows)
    _, true = truth(x, g)
    for name, a, b in zip(Needs._fields, got, true):
        if b.any():
            assert error(a, b) < STEPS, name
        else:
            assert not a.any(), name


@pytest.mark.parametrize("transform", ["", "mulrow:0 mulcol:1 mul:0.5 addcol:0", "mul:0.2 tanh mul:5.0"])
@pytest.mark.parametrize("tokens", [64, 16])
def test_one_sweep_gives_statistics_and_gradients(transform, tokens):
    x = head(n=20, v=70, k=1, transform=transform, weighted=True)
    g = gradients(20, square=True, sum="tanh" not in transform)
    stats, grads = engine.head_loss(x, g, OPERANDS, Windows(tokens, 70, F32))
    true, d = truth(x, g)
    assert error(stats.lse, true.lse) < STEPS
    assert error(stats.picked, true.picked) < STEPS
    assert stats.sum is None or error(stats.sum, true.sum) < STEPS
    assert error(grads.h, d[0]) < STEPS
    assert error(grads.w, d[1]) < STEPS
    assert stats.tie == 0
    assert stats.tie.signbit()


@pytest.mark.parametrize("transform", ["", "addcol:0 mulrow:1", EACH_STEP])
@pytest.mark.parametrize("windows", [Windows(64, 70, F32), Windows(16, 32, F32), Windows(16, 70, F32)])
def test_logits_that_lie_in_memory_are_read(monkeypatch, transform, windows):
    for module in (engine, triton_operands, sweep):
        monkeypatch.setattr(module, "multiplied_by_cublas", lambda head: True)
    x = head(n=37, v=70, k=2, transform=transform, weighted=True)
    g = gradients(37, 2, sum=True, entropy=True)
    stats = engine.head_stats(x, frozenset(STATS), windows)
    true, d_true = truth(x, g)
    for name in ("lse", "picked", "sum", "entropy", "variance", "max"):
        assert error(getattr(stats, name), getattr(true, name)) < STEPS, name
    assert torch.equal(stats.argmax, true.argmax)
    got = engine.head_stats_backward(x, g, stats, ALL, windows)
    for name, a, b in zip(Needs._fields, got, d_true):
        assert error(a, b) < STEPS if b.any() else not a.any(), name
    errors = []  # of several heads: how the logits round is the product's matter, and luck for a single row of 37
    for seed in range(3):
        x = head(n=37, v=70, k=2, transform=transform, weighted=True, seed=seed)
        g = gradients(37, 2, seed=seed + 1, square=True)
        stats, grads = engine.head_loss(x, g, OPERANDS, windows)
        true, d_true = truth(x, g)
        assert error(stats.lse, true.lse) < STEPS
        assert error(stats.picked, true.picked) < STEPS
        errors.append((error(grads.h, d_true[0]), error(grads.w, d_true[1])))
    assert torch.tensor(errors).square().mean(0).sqrt().max() < STEPS


@pytest.mark.parametrize("transform", ["", "mulrow:0 mulcol:1 mul:0.5 addcol:0"])
@pytest.mark.parametrize("needs", [OPERANDS, Needs(True, False, False, False), Needs(False, True, False, False)])
@pytest.mark.parametrize(("k", "kept"), [(0, 128), (1, 128), (2, 128), (1, 80), (2, 144)])
def test_a_part_of_the_exponentials_may_be_kept(monkeypatch, transform, needs, k, kept):
    monkeypatch.setattr(single_pass, "PARTLY", (F32,))
    x, g = head(n=37, v=300, k=k, transform=transform), gradients(37, k, square=True)
    if k:
        x.y[:8, 0] = torch.arange(kept - 4, kept + 4)
    stats, grads = engine.head_loss(x, g, needs, Windows(16, kept, F32))
    true, d = truth(x, g)
    assert error(stats.lse, true.lse) < STEPS
    assert not k or error(stats.picked, true.picked) < STEPS
    for need, got, exact in zip(needs, grads, d):
        assert error(got, exact) < STEPS if need else got is None


@pytest.mark.parametrize("n", [32, 37, 96])
@pytest.mark.parametrize("transform", ["", "addrow:0 mulcol:1"])
def test_a_long_sweep_takes_several_launches(monkeypatch, transform, n):
    """One a group of token blocks: 2 blocks of 16 tokens on the CPU."""
    x, want = head(n=n, v=70, k=2, transform=transform, weighted=True), frozenset(STATS)
    once = engine.head_stats(x, want, Windows(n, 70, F32))
    monkeypatch.setattr(statistics, "LAUNCH_FLOP", 1)
    assert [at.start for at in statistics.launches(x, want)] == list(range(0, n, 32))
    for name, got, one in zip(RowStats._fields, engine.head_stats(x, want, Windows(n, 70, F32)), once):
        assert (got is one is None) or (got.shape == one.shape and error(got, one) < STEPS), name


def test_the_lse_of_columns_that_are_not_kept_may_take_several_launches(monkeypatch):
    monkeypatch.setattr(single_pass, "PARTLY", (F32,))
    monkeypatch.setattr(statistics, "LAUNCH_FLOP", 1)
    x, g = head(n=80, v=300, k=1), gradients(80, 1)
    stats, grads = engine.head_loss(x, g, OPERANDS, Windows(48, 128, F32))
    true, d = truth(x, g)
    assert error(stats.lse, true.lse) < STEPS
    assert error(stats.picked, true.picked) < STEPS
    assert error(grads.h, d[0]) < STEPS
    assert error(grads.w, d[1]) < STEPS


@pytest.mark.parametrize("linear", [True, False])
def test_blocks_hold_what_the_planner_says_however_many_windows_there_are(monkeypatch, linear):
    """A block of dz and half of the float32 dh of one window: not those of two windows."""
    monkeypatch.setattr(single_pass, "PARTLY", (torch.float16,))
    tokens, kept, d = 128, 16, 512
    x, g = head(n=3 * tokens, v=2 * kept, d=d, dtype=torch.float16), gradients(3 * tokens)
    stats = engine.head_stats(x, frozenset({"lse"}), Windows(tokens, kept, F32))
    windows = Windows(tokens, kept, torch.float16)

    def step():
        if linear:
            return engine.head_loss(x, g, OPERANDS, windows)[1]
        return engine.head_stats_backward(x, g, stats, OPERANDS, windows)

    grads, allocated = cpu_allocations(step)
    held = peak_of(allocated) - 2 * (grads.h.numel() + grads.w.numel())
    half_of_dh = 2 * tokens * d
    assert half_of_dh < held < 2 * half_of_dh - (16 << 10)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("label", [0, 127, 128, 299])
@pytest.mark.parametrize("reverse", [False, True])
def test_kept_and_other_columns_may_lie_300_apart(monkeypatch, label, reverse):
    monkeypatch.setattr(single_pass, "PARTLY", (F32,))
    x, g = head(n=20, v=300, transform="addcol:0"), gradients(20)
    x.cols[0] = torch.linspace(-150, 150, 300).flip(0) if reverse else torch.linspace(-150, 150, 300)
    x.y[:] = label
    stats, grads = engine.head_loss(x, g, OPERANDS, Windows(20, 128, F32))
    true, d = truth(x, g)
    assert error(stats.lse, true.lse) < STEPS
    assert error(grads.h, d[0]) < 1e-5
    assert error(grads.w, d[1]) < 1e-5


def test_an_infinite_logit_among_the_others_is_not_lost(monkeypatch):
    monkeypatch.setattr(single_pass, "PARTLY", (F32,))
    x, g = head(n=20, v=300, transform="addcol:0"), gradients(20)
    x.cols[0, 200] = torch.inf
    x.y.clamp_(max=100)
    stats, grads = engine.head_loss(x, g, OPERANDS, Windows(20, 128, F32))
    assert stats.lse.isposinf().all()
    assert grads.h.isnan().all()
    x.cols[0, 128:] = -torch.inf
    stats, grads = engine.head_loss(x, g, OPERANDS, Windows(20, 128, F32))
    kept = Head(x.h, x.w[:128], x.y, x.cols[:, :128], x.rows, x.u, x.transform)
    true, d = truth(kept, g)
    assert error(stats.lse, true.lse) < STEPS
    assert error(grads.h, d[0]) < STEPS


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_generated_function_and_its_derivative_match_float64(name):
    x, g = head(n=20, v=70, transform=FUNCTIONS[name]), gradients(20)
    stats, grads = engine.head_loss(x, g, OPERANDS, Windows(16, 70, F32))
    true, d = truth(x, g)
    for got, exact in ((stats.lse, true.lse), (stats.picked, true.picked), (grads.h, d[0]), (grads.w, d[1])):
        assert error(got, exact) < STEPS


def test_every_word_of_a_function_is_computed_by_the_kernels():
    steps = [step for transform in FUNCTIONS.values() for step in parse(transform).steps]
    functions = [pointwise.parse_function(str(step.value)) for step in steps if step.op == "fn"]
    spoken = {op for function in functions for code in function.codes for op, _ in code.instructions}
    assert spoken == set(pointwise.OPS)


def test_a_sum_over_columns_that_are_set_has_no_gradient_there():
    x, g = head(transform="mulcol:1 setcol:0 mulrow:0", weighted=True), gradients(20, sum=True)
    x.cols[0] = torch.where(x.cols[0] < 0, torch.nan, x.cols[0])
    _, grads = engine.head_loss(x, g, OPERANDS, Windows(16, 70, F32))
    _, d = truth(x, g)
    assert error(grads.h, d[0]) < STEPS
    assert error(grads.w, d[1]) < STEPS


def dropping(transform: str, **more) -> Head:
    """A third of the columns is dropped, and every third token has its label there."""
    x = head(n=37, transform=transform, **more)
    x.cols[0] = (torch.arange(70) % 3 == 1).float()
    x.cols[1].abs_()
    x.y[:] = x.y // 3 * 3 % 69
    x.y[::3] += 1
    return x


DROPPING = ("dropcol:0", "mul:0.2 tanh mul:5.0 dropcol:0", "dropcol:0 mul:0.2 tanh mul:5.0", "dropcol:0 mulcol:1")


@pytest.mark.parametrize("transform", DROPPING)
@pytest.mark.parametrize(("k", "tokens", "kept"), [(1, 40, 70), (2, 16, 40)])
def test_dropped_columns_take_nothing_and_give_labels_no_gradient(monkeypatch, transform, k, tokens, kept):
    monkeypatch.setattr(single_pass, "PARTLY", (F32,))
    x, g = dropping(transform, k=k), gradients(37, k, square=True)
    stats, grads = engine.head_loss(x, g, OPERANDS, Windows(tokens, kept, F32))
    true, d = truth(x, g)
    assert error(stats.lse, true.lse) < STEPS
    torch.testing.assert_close(stats.picked.double(), true.picked, rtol=STEPS, atol=STEPS)
    assert error(grads.h, d[0]) < STEPS
    assert error(grads.w, d[1]) < STEPS
    assert not grads.w[1::3].any()
    saved = engine.head_stats(x, frozenset({"lse"}), Windows(tokens, kept, F32))
    again = engine.head_stats_backward(x, g, saved, OPERANDS, Windows(tokens, kept, F32))
    assert error(again.h, d[0]) < STEPS
    assert error(again.w, d[1]) < STEPS


@pytest.mark.parametrize("transform", ["dropcol:0", "tanh dropcol:0"])
def test_whatever_a_dropped_logit_was_is_forgotten(transform):
    x, g, windows, frozen_h = dropping(transform), gradients(37), Windows(40, 70, F32), Needs(False, True, False, False)
    x.y[:] = 3
    fine, d = engine.head_loss(x, g, frozen_h, windows)
    x.w[1], x.w[4], x.w[7] = torch.nan, torch.inf, -torch.inf
    stats, grads = engine.head_loss(x, g, frozen_h, windows)
    swept = engine.head_stats(x, frozenset({"lse", "max"}), windows)
    assert torch.equal(stats.lse, fine.lse)
    assert torch.equal(grads.w, d.w)
    assert error(swept.lse, fine.lse) < STEPS
    assert swept.max.isfinite().all()


def test_a_sum_over_dropped_columns_is_infinite_and_its_gradient_is_not():
    x, g = dropping("mulcol:1 dropcol:0", weighted=True), gradients(37, sum=True)
    stats, grads = engine.head_loss(x, g, OPERANDS, Windows(16, 70, F32))
    _, d = truth(x, g)
    assert stats.sum.isneginf().all()
    assert error(grads.h, d[0]) < STEPS
    assert error(grads.w, d[1]) < STEPS


@pytest.mark.parametrize("tokens", [37, 8])  # one sweep, or two for so few
@pytest.mark.parametrize("transform", ["dropcol:0", "tanh dropcol:0"])
def test_where_no_column_is_left_nothing_flows_back(transform, tokens):
    x = dropping(transform)
    x = x._replace(h=x.h[:tokens], y=x.y[:tokens])
    x.cols[0] = 1
    stats, grads = engine.head_loss(x, gradients(tokens), OPERANDS, Windows(tokens, 70, F32))
    assert stats.lse.isneginf().all()
    assert not grads.h.any()
    assert not grads.w.any()


@pytest.mark.parametrize("transform", ["tanh mul:3.0", FUNCTIONS["gelu"]])
def test_a_sum_behind_a_curved_step_takes_two_sweeps(transform):
    x = head(transform=transform)
    g = gradients(20, sum=True)
    _, grads = engine.head_loss(x, g, OPERANDS, Windows(16, 70, F32))
    _, d = truth(x, g)
    assert error(grads.h, d[0]) < STEPS
    assert error(grads.w, d[1]) < STEPS


def test_narrow_windows_of_the_vocabulary_give_the_same_gradients():
    x, g = head(), gradients(20)
    _, wide = engine.head_loss(x, g, OPERANDS, Windows(20, 70, F32))
    _, narrow = engine.head_loss(x, g, OPERANDS, Windows(16, 32, F32))
    assert error(narrow.h, wide.h) < STEPS
    assert error(narrow.w, wide.w) < STEPS


@pytest.mark.parametrize("needs", [Needs(True, False, False, False), Needs(False, True, False, False)])
def test_a_frozen_operand_has_no_gradient(needs):
    x, g = head(), gradients(20)
    _, grads = engine.head_loss(x, g, needs, Windows(16, 70, F32))
    _, d = truth(x, g)
    for need, got, true in zip(needs, grads, d):
        assert (got is not None) == need
        assert got is None or error(got, true) < STEPS


def test_no_gradient_at_all_is_a_forward_sweep():
    x = head()
    stats, grads = engine.head_loss(x, gradients(20), Needs(False, False, False, False), Windows(16, 70, F32))
    assert grads == (None, None, None, None)
    assert error(stats.lse, truth(x, gradients(20))[0].lse) < STEPS


@pytest.mark.parametrize("k", [0, 3])
def test_any_number_of_labels_a_row(k):
    x = head(k=k)
    if k:
        x.y[:, 1] = x.y[:, 0]  # a label given twice counts twice
    g = gradients(20, k)
    stats, grads = engine.head_loss(x, g, OPERANDS, Windows(20, 70, F32))
    true, d = truth(x, g)
    assert stats.picked.shape == (20, k)
    assert torch.allclose(stats.picked.double(), true.picked, rtol=1e-6, atol=1e-6)
    assert error(grads.h, d[0]) < STEPS
    assert error(grads.w, d[1]) < STEPS


@pytest.mark.parametrize("dtype", [F32, torch.float16])
@pytest.mark.parametrize("d", [13, 24])
def test_a_weight_contiguous_along_the_vocabulary_is_read_in_place(dtype, d):
    x = head(d=d, dtype=dtype)
    x = x._replace(w=x.w.t().contiguous().t())
    g = gradients(20)
    stats, grads = engine.head_loss(x, g, OPERANDS, Windows(16, 70, F32))
    true, exact = truth(x, g)
    slack = STEPS if dtype == F32 else 1e-3
    assert error(stats.lse, true.lse) < STEPS
    assert error(grads.h, exact[0]) < slack
    assert error(grads.w, exact[1]) < slack
    assert grads.w.is_contiguous()


def test_strided_operands_are_read_in_place():
    x = head(d=16)
    h = torch.stack((x.h, torch.full_like(x.h, torch.nan)), 2)[:, :, 0]
    got = engine.head_stats(x._replace(h=h), frozenset({"lse"}), Windows(16, 70, F32))
    assert error(got.lse, truth(x, gradients(20))[0].lse) < STEPS


def test_float16_gradients_do_not_underflow():
    x, g = head(dtype=torch.float16), gradients(20)
    g = RowGrads(g.lse / 4096, g.picked / 4096)
    _, grads = engine.head_loss(x, g, OPERANDS, Windows(16, 70, F32))
    _, d = truth(x, g)
    assert error(grads.h, d[0]) < 1e-3
    assert error(grads.w, d[1]) < 1e-3


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_a_common_offset_costs_no_more_than_its_own_rounding(offset):
    x, g = head(transform=f"add:{offset}"), gradients(20)
    stats, grads = engine.head_loss(x, g, OPERANDS, Windows(20, 70, F32))
    plain, exact = engine.head_loss(x._replace(transform=parse("")), g, OPERANDS, Windows(20, 70, F32))
    assert float((stats.lse - offset - plain.lse).abs().max()) <= 2e-3  # two units in the last place of 1e4
    assert error(grads.h, exact.h) < 2e-3


def spread(worst_label: bool) -> Head:
    """Logits of a row span 300 around 0 (bias), the label on the least or the most likely column."""
    x = head(transform="addcol:0", d=16)
    x.cols[0] = torch.linspace(-150, 150, 70)
    x.y[:] = 0 if worst_label else 69
    x.y[::3] = 35
    return x


@pytest.mark.parametrize("worst_label", [True, False])
def test_rows_that_span_300_are_right_whatever_the_label(worst_label):
    x, g = spread(worst_label), gradients(20)
    stats, grads = engine.head_loss(x, g, OPERANDS, Windows(20, 70, F32))
    true, d = truth(x, g)
    assert error(stats.lse, true.lse) < STEPS
    assert error(grads.h, d[0]) < 1e-5  # logits of 150 are rounded to 1e-5
    assert error(grads.w, d[1]) < 1e-5


def test_recomputed_gradients_keep_their_digits_where_the_lse_is_large():
    x, g = head(n=16, scale=60.0), gradients(16, entropy=True)
    stats = engine.head_stats(x, frozenset({"lse", "entropy"}), Windows(16, 70, F32))
    true, d = truth(x, g)
    assert true.lse.max() > 200
    grads = engine.head_stats_backward(x, g, stats, OPERANDS, Windows(16, 70, F32))
    blunt = engine.head_stats_backward(x, g, stats._replace(lse_low=None), OPERANDS, Windows(16, 70, F32))
    assert error(grads.w, d[1]) < 0.6 * error(blunt.w, d[1])


def test_only_the_token_blocks_that_need_it_are_redone():
    x, g = head(n=50, transform="addcol:0"), gradients(50)
    x.cols[0] = torch.linspace(-150, 150, 70)
    x.y[:] = 69
    x.y[20] = 0  # one row of the second block
    stats, grads = engine.head_loss(x, g, OPERANDS, Windows(50, 70, F32))
    true, d = truth(x, g)
    assert error(stats.lse, true.lse) < STEPS
    assert error(grads.h, d[0]) < 1e-5


def test_the_target_gradient_keeps_its_digits_when_p_tends_to_one():
    x = head(transform="addcol:0")
    x.cols[0] = 0
    x.cols[0, 5] = 40
    x.y[:] = 5
    ones = torch.ones(20)
    _, grads = engine.head_loss(x, RowGrads(ones, -ones[:, None]), OPERANDS, Windows(20, 70, F32))
    wide = doubled(x)
    z = (wide.h @ wide.w.T + wide.cols[0]).detach()
    others = z.clone()
    others[:, 5] = -torch.inf
    weights = (z - z.logsumexp(1, keepdim=True)).exp()
    weights[:, 5] = -(others.logsumexp(1) - z.logsumexp(1)).exp()
    # nothing is left of an entry near 1 but, at most, one of its roundings
    assert float((grads.h.double() - weights @ wide.w.detach()).abs().max()) < 3e-7


def test_ignored_rows_have_no_gradient_and_bare_targets_have_only_theirs():
    x, g = head(k=1), gradients(20)
    g.lse[:3] = 0
    g.picked[:3] = 0  # ignored
    g.lse[3:6] = 0  # only the picked logit counts
    _, grads = engine.head_loss(x, g, OPERANDS, Windows(20, 70, F32))
    _, d = truth(x, g)
    assert not grads.h[:3].any()
    assert error(grads.h[3:6], d[0][3:6]) < STEPS
    assert error(grads.w, d[1]) < STEPS


def test_masked_columns_take_no_part():
    x, g = head(transform="addcol:0"), gradients(20)
    x.cols[0] = 0
    x.cols[0, 40:] = -torch.inf
    x.y.clamp_(max=39)
    kept = Head(x.h, x.w[:40], x.y, x.cols[:, :40], x.rows, x.u, x.transform)
    stats, grads = engine.head_loss(x, g, OPERANDS, Windows(20, 70, F32))
    true, d = truth(kept, g)
    assert error(stats.lse, true.lse) < STEPS
    assert error(grads.h, d[0]) < STEPS
    assert not grads.w[40:].any()


def test_a_masked_target_leaves_the_others_gradients_right():
    x, g = head(transform="addcol:0"), gradients(20)
    x.cols[0] = 0
    x.cols[0, 40:] = -torch.inf
    x.y[:] = 50
    x.y[::3] = 7
    stats, grads = engine.head_loss(x, g, OPERANDS, Windows(20, 70, F32))
    true, d = truth(x, g)
    assert torch.equal(stats.picked.isneginf(), x.y == 50)
    assert error(stats.lse, true.lse) < STEPS
    assert error(grads.h, d[0]) < STEPS
    assert error(grads.w, d[1]) < STEPS


def test_a_row_that_is_not_finite_stays_alone():
    x = head()
    x.h[2], x.h[5] = torch.nan, torch.inf
    got = engine.head_stats(x, frozenset(STATS), Windows(20, 70, F32))
    fine = torch.ones(20, dtype=torch.bool)
    fine[[2, 5]] = False
    true, _ = truth(x, gradients(20))
    assert torch.equal(got.lse.isfinite(), fine)
    assert got.lse[2].isnan()
    assert got.max[2].isnan()
    assert error(got.lse[fine], true.lse[fine]) < STEPS


@pytest.mark.parametrize("dtype", [F32, torch.float16])
@pytest.mark.parametrize("tokens", [20, 8])  # one sweep, or two for so few
def test_a_row_with_infinite_logits_has_no_gradient_and_others_have_theirs(tokens, dtype):
    x, g = head(n=tokens, transform="addrow:0 addcol:1", dtype=dtype), gradients(tokens)
    x.cols[1] = 0
    x.rows[0, [2, 5]] = torch.tensor([torch.inf, -torch.inf])
    stats, grads = engine.head_loss(x, g, Needs(True, False, False, False), Windows(tokens, 70, dtype))
    fine = torch.ones(tokens, dtype=torch.bool)
    fine[[2, 5]] = False
    _, d = truth(x, g)
    assert stats.lse[~fine].tolist() == [torch.inf, -torch.inf]
    assert grads.h[~fine].isnan().all()
    assert error(grads.h[fine], d[0][fine]) < (STEPS if dtype == F32 else 2e-3)
    x.rows.zero_()
    x.cols[1, 3] = torch.inf
    _, grads = engine.head_loss(x, g, OPERANDS, Windows(tokens, 70, dtype))
    assert grads.w.isnan().all()


def test_argmax_is_taken_on_rounded_logits_with_the_first_index_on_ties():
    x = head(transform="mul:1.0 round:float16", scale=0.01)
    got = engine.head_stats(x, frozenset({"max", "argmax"}), Windows(20, 70, F32))
    rounded = (x.h @ x.w.T).half()
    tied = (rounded == rounded.amax(1, keepdim=True)).float()
    assert torch.equal(got.argmax, tied.argmax(1))
    assert torch.equal(got.max, rounded.amax(1).float())


def test_no_tokens_give_empty_statistics_and_zero_gradients():
    x = head(n=0)
    g = RowGrads(torch.empty(0), torch.empty(0, 1))
    stats, grads = engine.head_loss(x, g, OPERANDS, Windows(16, 70, F32))
    assert stats.lse.shape == (0,)
    assert grads.h.shape == (0, 16)
    assert not grads.w.any()


@triton.jit
def _visits(seen, slots_seen, N, V, GROUP, BM: tl.constexpr, BN: tl.constexpr):
    pid = tl.program_id(0)
    P = tl.num_programs(0)
    main_steps, steps = step_counts(pid, P, N, V, GROUP, BM, BN)
    for step in range(0, steps):
        block, tile, slot, last = locate(step, main_steps, pid, P, N, V, GROUP, BM, BN)
        at = seen + block * tl.cdiv(V, BN) + tile
        tl.store(at, tl.load(at) + 1)
        if last:
            start, _, _ = partial_offset(block, slot, P, N, V, GROUP, BM, BN)
            to = slots_seen + start + tl.arange(0, BM)
            tl.store(to, tl.load(to) + 1)


@pytest.mark.parametrize("blocks", [1, 3, 5, 8])
@pytest.mark.parametrize("tiles", [1, 4, 9])
@pytest.mark.parametrize("multiprocessors", [1, 6, 7])
def test_the_schedule_visits_every_tile_once_and_fills_every_slot_once(blocks, tiles, multiprocessors):
    tile = triton_tiles.Tile(2, 4, 1, 3, 1, 1)
    n, v = blocks * 2 - 1, tiles * 4 - 1
    plan = schedule(n, v, tile, multiprocessors)
    seen, filled = torch.zeros(blocks, tiles, dtype=torch.int32), torch.zeros(plan.size, dtype=torch.int32)
    _visits[(plan.programs,)](seen, filled, n, v, plan.group, BM=2, BN=4)
    assert plan.programs <= multiprocessors
    assert seen.eq(1).all()
    assert filled.eq(1).all()


@pytest.mark.parametrize("at_once", [True, False])
def test_a_difference_from_the_lse_errs_no_more_than_eager_code_whatever_the_logits_share(at_once):
    ours, eager = 0.0, 0.0
    for seed in range(6):
        one = head(transform="addcol:0", seed=seed)
        one = one._replace(cols=one.cols[:1] + 1e4)
        c = torch.full((len(one.h),), 1 / len(one.h))
        if at_once:
            got = engine.head_loss(one, RowGrads(c, -c[:, None]), OPERANDS, Windows(16, 70, F32))[0]
        else:
            got = engine.head_stats(one, frozenset({"lse", "picked"}), Windows(20, 70, F32))
        z = torch.nn.functional.linear(one.h, one.w, one.cols[0])
        true = torch.nn.functional.linear(one.h.double(), one.w.double(), one.cols[0].double())
        labels = one.y[:, 0]
        losses = torch.nn.functional.cross_entropy(true, labels, reduction="none")
        ours += float(((got.lse - got.picked[:, 0] + got.lse_low) - losses).square().sum())
        eager += float((torch.nn.functional.cross_entropy(z, labels, reduction="none") - losses).square().sum())
    assert ours <= 1.05 * eager


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("offset", [0.0, 1e2, 1e4, 1e6])
def test_the_spread_errs_no_more_than_eager_code_whatever_all_logits_share(offset, weighted):
    errors = torch.zeros(3, dtype=torch.float64)
    for seed in range(6):
        x = head(n=18, v=150, k=1, transform="addcol:0", seed=seed, weighted=weighted)
        x.cols[0] += offset
        u = x.u if weighted else torch.ones(150)
        true = -((x.h.double() @ x.w.double().T + x.cols[0].double()).log_softmax(1) @ u.double())
        eager = -((x.h @ x.w.T + x.cols[0]).log_softmax(1) @ u)
        stats = engine.head_stats(x, frozenset({"lse", "sum", "spread"}), Windows(18, 150, F32))
        c = gradients(18, sum=True)
        assert single_pass.can_single_pass(engine.ready_head(x), c, OPERANDS, Windows(18, 150, F32))
        loss, _ = engine.head_loss(x, c, OPERANDS, Windows(18, 150, F32))
        for at, found in enumerate((eager, stats.spread, loss.spread)):
            errors[at] += (found.double() - true).square().sum()
    rounding = 2.0**-24 * float(true.norm()) * 6**0.5
    assert bool((errors[1:].sqrt() <= 1.05 * errors[0].sqrt() + rounding).all())
