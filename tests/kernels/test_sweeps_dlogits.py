"""The sweep of gradients against float64. Kernels run in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is published for Linux only")
if torch.cuda.is_available():
    pytest.skip("kernels are compiled here, not interpreted: benchmarks/gpu_check.py", allow_module_level=True)


from fusedhead.kernels.contract import Needs, RowGrads, Windows
from fusedhead.kernels.triton_engine import engine
from fusedhead.lowering.gain import computed, times_gain
from tests.kernels.interpreted import (
    ALL,
    CURVED,
    EACH_STEP,
    F32,
    FUNCTIONS,
    OPERANDS,
    STEPS,
    doubled,
    error,
    gradients,
    head,
    truth,
)

# numpy speaks up where a GPU stays silent (log2 0, inf - inf)
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")


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


def test_a_sum_over_columns_that_are_set_has_no_gradient_there():
    x, g = head(transform="mulcol:1 setcol:0 mulrow:0", weighted=True), gradients(20, sum=True)
    x.cols[0] = torch.where(x.cols[0] < 0, torch.nan, x.cols[0])
    _, grads = engine.head_loss(x, g, OPERANDS, Windows(16, 70, F32))
    _, d = truth(x, g)
    assert error(grads.h, d[0]) < STEPS
    assert error(grads.w, d[1]) < STEPS


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


def test_float16_gradients_times_their_gain_do_not_underflow():
    x, g = head(dtype=torch.float16), gradients(20)
    g = RowGrads(g.lse / 4096, g.picked / 4096)
    (c_lse, c_picked, _), inverse = times_gain(computed, x.h, [g.lse, g.picked, None], None, 0)
    _, grads = engine.head_loss(x, RowGrads(c_lse, c_picked), OPERANDS, Windows(16, 70, F32))
    _, d = truth(x, g)
    assert error(grads.h.float() * inverse, d[0]) < 1e-3
    assert error(grads.w.float() * inverse, d[1]) < 1e-3


def test_recomputed_gradients_keep_their_digits_where_the_lse_is_large():
    x, g = head(n=16, scale=60.0), gradients(16, entropy=True)
    stats = engine.head_stats(x, frozenset({"lse", "entropy"}), Windows(16, 70, F32))
    true, d = truth(x, g)
    assert true.lse.max() > 200
    grads = engine.head_stats_backward(x, g, stats, OPERANDS, Windows(16, 70, F32))
    blunt = engine.head_stats_backward(x, g, stats._replace(lse_low=None), OPERANDS, Windows(16, 70, F32))
    assert error(grads.w, d[1]) < 0.6 * error(blunt.w, d[1])


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
