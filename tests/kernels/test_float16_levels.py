"""Float16 exponentials relative to the level of their row, in one sweep: against float64 and eager float16 code."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is published for Linux only")
if torch.cuda.is_available():
    pytest.skip("kernels are compiled here, not interpreted: tests/gpu", allow_module_level=True)

from fusedhead.kernels.contract import Head, HeadGrads, RowGrads, RowStats, Windows
from fusedhead.kernels.transform.transform import parse
from fusedhead.kernels.triton_engine import engine, single_pass
from fusedhead.kernels.triton_engine.float8.level import LABELLED, STRIDED
from fusedhead.lowering.gain import computed, times_gain
from fusedhead.lowering.plan.problem import Problem
from fusedhead.lowering.plan.triton import LEVEL_VOCAB, classes_beside, samples_levels
from tests.kernels.interpreted import F32, OPERANDS, error

# numpy speaks up where a GPU stays silent (log2 0, inf - inf)
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")
N, V, D = 48, 300, 16


@pytest.fixture(autouse=True)
def swept(monkeypatch):
    """Levels for heads of any size; the number of token blocks that each window swept again."""
    marked, counts = single_pass.rebase_unsafe, []

    def counted(*args):
        flags, lost = marked(*args)
        counts.append(int(flags.sum()))
        return flags, lost

    monkeypatch.setattr(single_pass, "LEVEL_SHARE", 0)
    monkeypatch.setattr(single_pass, "rebase_unsafe", counted)
    return counts


def made(sharp: float = 4.0, seed: int = 0) -> Head:
    """Logits of standard deviation ``sharp``; half of the labels are the likeliest class, a seventh are one class."""
    draw = torch.Generator().manual_seed(seed)
    h, w = torch.randn(N, D, generator=draw).half(), (torch.randn(V, D, generator=draw) * sharp / D**0.5).half()
    y = torch.randint(0, V, (N, 1), generator=draw)
    y[::2, 0] = (h.float() @ w.float().t()).argmax(1)[::2]
    y[: N // 7] = 7
    nothing = torch.empty(0)
    return Head(h, w, y, nothing[None], nothing[None], nothing, parse(""))


def mean_loss(head: Head) -> RowGrads:
    """The coefficients of a mean over the tokens but every 17th, times the gain."""
    keep = (torch.arange(N) % 17 != 3).float()
    c = keep / keep.sum()
    (c_lse, c_picked, _), _ = times_gain(computed, head.h, [c, -c[:, None], None], None, V)
    return RowGrads(c_lse, c_picked)


def passed(head: Head, c: RowGrads) -> tuple[RowStats, HeadGrads]:
    return engine.head_loss(head, c, OPERANDS, Windows(32, V, F32))


def true(head: Head, c: RowGrads) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    h, w = head.h.double(), head.w.double()
    z = h @ w.t()
    dz = (z.softmax(1) * c.lse.double()[:, None]).scatter_add(1, head.y, c.picked.double())
    return z.logsumexp(1), dz @ w, dz.t() @ h


def eager(head: Head, c: RowGrads) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Eager code in float16, whose loss scale is the gain."""
    h, w = head.h.float(), head.w.float()
    z = (h @ w.t()).half().float()
    dz = (z.softmax(1) * c.lse[:, None]).scatter_add(1, head.y, c.picked).half().float()
    return z.logsumexp(1), (dz @ w).half(), (dz.t() @ h).half()


def within_eager(heads: list[Head]) -> None:
    """The mean square of the error of several heads is at most eager's, for each result."""
    squares = torch.zeros(3, 2, dtype=torch.float64)
    for head in heads:
        c = mean_loss(head)
        stats, grads = passed(head, c)
        for at, (ours, other, exact) in enumerate(zip((stats.lse, grads.h, grads.w), eager(head, c), true(head, c))):
            squares[at] += torch.tensor([error(ours, exact), error(other, exact)], dtype=torch.float64) ** 2
    assert (squares[:, 0] <= squares[:, 1]).all(), squares.sqrt()


@pytest.mark.parametrize("sharp", [2.0, 4.0, 8.0])
def test_errors_are_at_most_those_of_eager_float16(swept, sharp):
    within_eager([made(sharp, seed) for seed in range(3)])
    assert sum(swept) == 0


def test_a_far_row_has_the_errors_of_eager_float16():
    heads = [made(seed=seed) for seed in range(3)]
    for head in heads:
        head.h[::5] *= 50
    within_eager(heads)


def test_logits_of_60000_have_the_errors_of_eager_float16():
    heads = [made(seed=seed) for seed in range(2)]
    for head in heads:
        z = (head.h.float() @ head.w.float().t()).abs().amax(1, keepdim=True)
        head.h.copy_(head.h.float() * 60000 / z)
        assert (head.h.float() @ head.w.float().t()).abs().max() > 59000
    within_eager(heads)


@pytest.mark.parametrize("off", [-400.0, -60.0, 60.0, 400.0])
def test_rows_whose_level_is_far_off_are_swept_again(monkeypatch, swept, off):
    head = made(6.0)
    head.y[:] = (head.h.float() @ head.w.float().t()).argmin(1, keepdim=True)  # unlikely: none raises the level
    c = mean_loss(head)
    levels = single_pass.row_levels
    monkeypatch.setattr(single_pass, "row_levels", lambda head: levels(head) + off)
    stats, grads = passed(head, c)
    assert sum(swept) > 0
    lse, dh, dw = true(head, c)
    assert error(stats.lse, lse) < 2e-7
    assert error(grads.h, dh) < 4e-4
    assert error(grads.w, dw) < 4e-4


def test_a_level_that_misses_the_likeliest_class_is_raised_by_the_label_or_swept_again(monkeypatch, swept):
    head = made(8.0)
    monkeypatch.setattr(single_pass, "row_levels", lambda head: torch.full((N,), -30.0))
    c = mean_loss(head)
    stats, grads = passed(head, c)
    lse, dh, dw = true(head, c)
    assert sum(swept) > 0
    assert error(stats.lse, lse) < 2e-7
    assert error(grads.h, dh) < 4e-4
    assert error(grads.w, dw) < 4e-4


def test_the_lse_comes_from_sums_that_are_not_rounded_to_float16():
    head = made()
    c = mean_loss(head)
    stats, _ = passed(head, c)
    assert error(stats.lse, true(head, c)[0]) < 1e-7
    wide = engine.head_loss(head._replace(h=head.h.float(), w=head.w.float()), c, OPERANDS, Windows(32, V, F32))[0]
    assert error(stats.lse, wide.lse.double()) < 1e-7


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_broken_row_stays_alone(bad):
    head = made()
    c = mean_loss(head)
    head.h[5, 3] = bad
    stats, grads = passed(head, c)
    lse, dh, _ = true(head, c)
    others = torch.arange(N) != 5
    assert error(stats.lse[others], lse[others]) < 2e-7
    assert error(grads.h[others], dh[others]) < 4e-4
    assert not grads.h[5].isfinite().any()


def test_the_planner_knows_which_heads_take_levels(monkeypatch):
    monkeypatch.undo()
    assert LEVEL_VOCAB == single_pass.LEVEL_SHARE * (STRIDED + LABELLED)
    for vocab in (LEVEL_VOCAB - 1, LEVEL_VOCAB):
        for transform in ("", "mul:0.5"):
            h, w = (torch.empty(m, 8, dtype=torch.half, device="meta") for m in (4, vocab))
            head = Head(h, w, *[torch.empty(0)] * 4, parse(transform))
            problem = Problem(4, vocab, 8, torch.half, "cuda", torch.half, transform=parse(transform))
            assert samples_levels(problem, "single pass") == single_pass.estimates_level(head)
    assert classes_beside(problem, "single pass") == vocab  # a first sweep
    assert classes_beside(problem, "recompute") == 0
