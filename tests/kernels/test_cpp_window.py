"""The C++ kernel of float32 heads on a CPU: any size, errors no larger than eager code's, the same each time."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.measure import cpu_allocations, peak_of
from fusedhead.kernels.contract import Head, Needs, RowGrads, RowStats, Windows
from fusedhead.kernels.torch_engine import cpp_library, engine, softmax_gradients
from fusedhead.kernels.torch_engine.cpp_window import PANEL, CppWindow, cpp_workspace, items_of, lanes_of
from fusedhead.kernels.torch_engine.workspace import rows_workspace
from fusedhead.kernels.transform.transform import parse
from fusedhead.lowering.plan.plan import plan
from fusedhead.lowering.plan.problem import Problem
from tests.lowering.heads import OPS, none, operands

BOTH, HIDDEN = Needs(True, True, False, False), Needs(True, False, False, False)
WEIGHT, NOTHING = Needs(False, True, False, False), Needs(False, False, False, False)
STATS = frozenset({"lse", "picked", "sum"})
THREADS = 2
DRAWS = 6


@pytest.fixture(autouse=True)
def kernel() -> None:
    """Here it must compile: a fallback that nobody notices would leave these tests about torch ops."""
    if cpp_library.platform.machine() not in cpp_library.MACHINES:
        pytest.skip("no x86 CPU")
    assert cpp_library.library() is not None


def head_of(n: int, v: int, d: int, k: int = 1, scale: float = 1.0, weighted: bool = False, size: float = 1.0) -> Head:
    h, w = torch.randn(n, d) * size / d**0.5, torch.randn(v, d)
    none, u = torch.empty(0), torch.randn(v) if weighted else torch.empty(0)
    return Head(h, w, torch.randint(v, (n, k)), none, none, u, parse("" if scale == 1 else f"mul:{scale!r}"))


def eager(head: Head, upstream: RowGrads, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """lse, picked, sum, and dh and dw for their upstream gradients, as a user would write them in ``dtype``."""
    h, w = (x.detach().to(dtype).requires_grad_() for x in (head.h, head.w))
    scale = head.transform.plain_scale
    z = (h @ w.t()) * (1.0 if scale is None else scale)
    u = head.u.to(dtype) if head.u.numel() else torch.ones(len(w), dtype=dtype)
    results = z.logsumexp(1), z.gather(1, head.y), z @ u
    inputs = [g for g in (upstream.lse, upstream.picked, upstream.sum) if g is not None]
    used = [r for r, g in zip(results, (upstream.lse, upstream.picked, upstream.sum)) if g is not None]
    grads = torch.autograd.grad(used, (h, w), [g.to(dtype) for g in inputs])
    return tuple(r.detach() for r in results) + grads


def off(got: tuple[Tensor | None, ...], true: tuple[Tensor, ...]) -> Tensor:
    return torch.stack([(a.double() - b).norm() / b.norm().clamp(min=1e-30) for a, b in zip(got, true)])  # type: ignore[union-attr]


def of_all(draws: Sequence[tuple[Tensor | None, ...]]) -> tuple[Tensor, ...]:
    """Each result of all draws as one vector, whose norm no draw makes small by chance.

    Where a head has one class, dz = g_lse + g_sum. A draw in which they cancel leaves the rounding errors of products
    with them; eager code subtracts them before it multiplies, without an error. Heads with more classes have no such
    luck: their probabilities are rounded.
    """
    return tuple(torch.cat([x.double().flatten() for x in each]) for each in zip(*draws))  # type: ignore[union-attr]


def lse_of(stats: RowStats) -> Tensor:
    assert stats.lse_low is not None
    return stats.lse.double() + stats.lse_low.double()


def both_ways(head: Head, c: RowGrads, needs: Needs, windows: Windows) -> list[tuple[Tensor | None, ...]]:
    """(lse, picked, sum, dh, dw) of one sweep, and of statistics with a backward pass."""
    stats, grads = engine.head_loss(head, c, needs, windows)
    one = (lse_of(stats), stats.picked, stats.sum, grads.h, grads.w)
    stats = engine.head_stats(head, STATS, windows)
    grads = engine.head_stats_backward(head, c, stats, needs, windows)
    return [one, (lse_of(stats), stats.picked, stats.sum, grads.h, grads.w)]


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n=st.integers(1, 70), v=st.integers(1, 400), d=st.integers(1, 80), k=st.integers(0, 3), seed=st.integers(0, 999),
    tokens=st.integers(1, 80), threads=st.integers(1, 3), scale=st.sampled_from([1.0, 0.7, -2.0, 0.0]),
    weighted=st.booleans(), transposed=st.booleans(), needs=st.sampled_from([BOTH, HIDDEN, WEIGHT]),
)  # fmt: skip
def test_a_head_of_any_size_errs_no_more_than_eager_code(
    n, v, d, k, seed, tokens, threads, scale, weighted, transposed, needs
):
    ours, theirs, truths = [], [], []
    for draw in range(DRAWS):
        torch.manual_seed(DRAWS * seed + draw)
        head = head_of(n, v, d, k, scale, weighted)
        if transposed:
            head = head._replace(w=head.w.t().contiguous().t())
        c = RowGrads(torch.randn(n), torch.randn(n, k) if k else None, torch.randn(n))
        true = eager(head, c, torch.float64)
        results = both_ways(head, c, needs, Windows(tokens, v, torch.float32, threads=threads))
        asked = [at for at, x in enumerate(results[0]) if x is not None and x.numel()]
        truths.append(tuple(true[at] for at in asked))
        theirs.append(tuple(x for at, x in enumerate(eager(head, c, torch.float32)) if at in asked))
        ours.append([tuple(got[at] for at in asked) for got in results])
        assert all((got[3] is None, got[4] is None) == (not needs.h, not needs.w) for got in results)
    exact = of_all(truths)
    limit = 1.5 * off(of_all(theirs), exact) + 2.0**-21
    for way in zip(*ours):
        assert bool((off(of_all(way), exact) <= limit).all()), (off(of_all(way), exact), limit)


@pytest.mark.parametrize("size", [1e2, 1e4, 1e8, 1e12, 1e30])
def test_logits_of_any_size_are_served(size):
    torch.manual_seed(0)
    head = head_of(37, 1100, 16, size=size * 4)
    head.y[::2, 0] = (head.h @ head.w.t()).argmax(1)[::2]
    c = RowGrads(torch.full((37,), 1 / 37), torch.full((37, 1), -1 / 37))
    true = eager(head, c, torch.float64)
    allowed = off(eager(head, c, torch.float32), true) * 1.5 + 2.0**-21
    for got in both_ways(head, c, BOTH, Windows(16, 1100, torch.float32, threads=THREADS)):
        kept = [0, 1, 3, 4]
        assert bool((off(tuple(got[at] for at in kept), tuple(true[at] for at in kept)) <= allowed[kept]).all())


@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
def test_a_broken_row_stays_alone(broken):
    torch.manual_seed(0)
    head = head_of(70, 300, 33)
    head.h[41, 5] = broken
    upstream = torch.full((70,), 1 / 70), torch.full((70, 1), -1 / 70)
    c = RowGrads(*upstream)
    whole = [at for at in range(70) if at != 41]
    true = eager(
        head._replace(h=head.h[whole], y=head.y[whole]), RowGrads(c.lse[whole], c.picked[whole]), torch.float64
    )  # type: ignore[index]
    for lse, _, _, dh, _ in both_ways(head, c, BOTH, Windows(64, 300, torch.float32, threads=THREADS)):
        assert lse is not None
        assert dh is not None
        assert not bool(lse[41].isfinite())
        assert bool(dh[41].isnan().all())
        assert float(off((lse[whole], dh[whole]), (true[0], true[3])).max()) < 1e-6


def test_results_are_the_same_each_time_and_with_any_number_of_threads_that_share_the_items():
    torch.manual_seed(0)
    head = head_of(96, 5000, 64)
    c = RowGrads(torch.randn(96), torch.randn(96, 1))
    runs = [engine.head_loss(head, c, BOTH, Windows(48, 5000, torch.float32, threads=3)) for _ in range(5)]
    for stats, grads in runs[1:]:
        assert torch.equal(stats.lse, runs[0][0].lse)
        assert torch.equal(grads.h, runs[0][1].h)
        assert torch.equal(grads.w, runs[0][1].w)
    assert items_of(4, 1 << 15) == items_of(8, 1 << 15) == 16


@pytest.mark.parametrize("needs", [BOTH, HIDDEN, NOTHING])
@pytest.mark.parametrize("known", [False, True], ids=["one sweep", "backward pass"])
def test_the_prediction_bounds_what_a_window_holds(needs, known):
    n, v, d, tokens = 300, 9000, 48, 96
    head, windows = head_of(n, v, d), Windows(tokens, v, torch.float32, threads=THREADS)
    c, lse = RowGrads(torch.ones(n), torch.ones(n, 1)), torch.zeros(n)
    if known and not any(needs):
        return

    def run() -> list[Tensor | None]:
        if known:
            return list(engine.head_stats_backward(head, c, RowStats(lse), needs, windows))
        return list(engine.head_loss(head, c, needs, windows)[1])

    got, allocated = cpu_allocations(run)
    held = peak_of(allocated) - sum(x.nbytes for x in got if x is not None)
    keep = needs.w and not known
    assert held <= rows_workspace(n, v, d, 1, tokens) + cpp_workspace(tokens, v, d, needs, THREADS, keep)


def test_planner_and_engine_agree_where_it_serves(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: THREADS)
    large = Problem(1024, 32000, 512, torch.float32, "cpu", torch.float32)
    for asked in (large, large._replace(needs=NOTHING), large._replace(needs=HIDDEN), large._replace(linear=False)):
        planned = plan(asked)
        assert planned.windows.threads == THREADS
        assert planned.windows.vocab == asked.vocab
        assert planned.predicted_bytes <= 1024 * 32000 * 4 // 2
    for other in (
        large._replace(tokens=8),  # small
        large._replace(dtype=torch.bfloat16, products=torch.bfloat16),
        large._replace(device_type="cuda"),
        large._replace(transform=parse("tanh")),
        large._replace(explicit=True, row_scale=False),
    ):
        assert plan(other).windows.threads == 0
    assert plan(large, memory=-1).windows.threads == 0


def test_without_a_compiler_torch_ops_compute_the_head(monkeypatch):
    def fails(source: str) -> None:
        raise OSError("no compiler")

    monkeypatch.setattr(cpp_library, "compiled_library", fails)
    cpp_library._load.cache_clear()
    try:
        assert cpp_library.library() is None
        assert plan(Problem(1024, 32000, 512, torch.float32, "cpu", torch.float32)).windows.threads == 0
    finally:
        monkeypatch.undo()
        cpp_library._load.cache_clear()


def test_a_large_head_s_op_runs_it(monkeypatch):
    monkeypatch.setattr(cpp_library, "LEAST_FLOP", 0)
    windows = []

    def watched(head: Head, needs: Needs, chosen: Windows, keep: bool) -> CppWindow:
        windows.append(chosen)
        return CppWindow(head, needs, chosen, keep)

    monkeypatch.setattr(softmax_gradients, "CppWindow", watched)
    torch.manual_seed(0)
    n = 1024
    o = operands(n, 4000, 32, dtype=torch.float32, u=False)
    c, e = torch.full((n,), 1 / n), none(o.h)
    got = OPS.head_loss(*o, c, -c[:, None], e, e, "", "lse,picked", 0, True, True, False, False)
    assert [each.threads for each in windows] == [torch.get_num_threads()]
    true = eager(Head(*o, parse("")), RowGrads(c, -c[:, None]), torch.float64)
    assert float(off((got[0], got[1], *got[3:5]), (*true[:2], *true[3:])).max()) < 1e-6


def test_rows_of_tokens_do_not_share_few_places_of_a_cache():
    assert lanes_of(192) == 192
    assert lanes_of(256) % 256
    assert lanes_of(1) >= 32
    assert PANEL % 14 == 0
