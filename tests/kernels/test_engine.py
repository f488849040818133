"""The contract holds for every engine: the three functions give the definitions' statistics and gradients."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from fusedhead.kernels.contract import STATS, Needs, RowGrads, Windows
from fusedhead.kernels.torch_engine import engine as torch_engine
from fusedhead.kernels.triton_engine import engine as triton_engine
from tests.kernels.interpreted import ALL, F32, OPERANDS, error, gradients, head, truth

# numpy speaks up where a GPU stays silent (log2 0, inf - inf)
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")
ENGINES = pytest.mark.parametrize("engine", [torch_engine, triton_engine], ids=["torch", "triton"])
TRANSFORMS = ("", "addcol:0 mul:0.2 tanh mul:5.0 mulrow:0")
N, V, EXACT = 37, 90, 2e-6
WINDOWS = Windows(16, V, F32)


@ENGINES
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_statistics_are_their_definitions(engine: ModuleType, transform: str) -> None:
    x = head(n=N, v=V, k=2, transform=transform, weighted=True)
    stats, (exact, _) = engine.head_stats(x, frozenset(STATS), WINDOWS), truth(x, gradients(N, 2))
    for name in ("lse", "picked", "sum", "entropy", "variance", "max", "spread"):
        assert error(getattr(stats, name), getattr(exact, name)) < EXACT, name
    assert torch.equal(stats.argmax, exact.argmax)


@ENGINES
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_gradients_of_any_upstream_are_autograds(engine: ModuleType, transform: str) -> None:
    x = head(n=N, v=V, k=2, transform=transform)
    g = gradients(N, 2, entropy=True, variance=True, sum=True)
    stats = engine.head_stats(x, frozenset(STATS), WINDOWS)
    got, (_, exact) = engine.head_stats_backward(x, g, stats, ALL, WINDOWS), truth(x, g)
    for name, ours, true in zip(Needs._fields, got, exact):
        assert error(ours, true) < EXACT if true.any() else not ours.any(), name


@ENGINES
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_loss_linear_in_the_statistics_gets_both_at_once(engine: ModuleType, transform: str) -> None:
    x, g = head(n=N, v=V, transform=transform), gradients(N, square=True)
    (stats, got), (exact, grads) = engine.head_loss(x, g, OPERANDS, WINDOWS), truth(x, g)
    assert error(stats.lse, exact.lse) < EXACT
    assert error(stats.picked, exact.picked) < EXACT
    assert error(got.h, grads[0]) < EXACT
    assert error(got.w, grads[1]) < EXACT
    assert got.cols is None
    assert got.rows is None


@ENGINES
def test_no_tokens_give_empty_results_and_a_gradient_of_zeros(engine: ModuleType) -> None:
    x = head(n=0, v=V)
    stats = engine.head_stats(x, frozenset({"lse", "picked"}), WINDOWS)
    assert (stats.lse.shape, stats.picked.shape) == ((0,), (0, 1))
    grads = engine.head_stats_backward(x, RowGrads(torch.empty(0), torch.empty(0, 1)), stats, OPERANDS, WINDOWS)
    assert grads.h.shape == x.h.shape
    assert torch.equal(grads.w, torch.zeros_like(x.w))
