"""The contract of the engines: its formula for the gradient of the logits is autograd's, for every statistic."""

from __future__ import annotations

import pytest
import torch

from fusedhead.kernels.contract import (
    DIFFERENTIABLE_STATS,
    STATISTICS,
    RowGrads,
    RowStats,
    WholeLogits,
    logit_grads,
    with_companions,
)

N, V, K = 5, 23, 2


def logits(weighted: bool) -> WholeLogits:
    z = (3 * torch.randn(N, V, dtype=torch.float64)).requires_grad_()
    u = torch.rand(V, dtype=torch.float64) if weighted else torch.empty(0, dtype=torch.float64)
    return WholeLogits(z, z, z.log_softmax(1), torch.randint(0, V, (N, K)), u)


def by_formula(at: WholeLogits, upstream: RowGrads, stats: RowStats) -> torch.Tensor:
    """dz of the module's docstring, written out."""
    grads = logit_grads(upstream, stats)
    zero = torch.zeros(N, dtype=torch.float64)
    constant, linear, quadratic, total = (
        zero if g is None else g for g in (grads.constant, grads.linear, grads.quadratic, grads.sum)
    )
    assert stats.entropy is not None
    d = at.logp + stats.entropy[:, None]
    dz = at.logp.exp() * (constant[:, None] - linear[:, None] * d + quadratic[:, None] * d * d)
    if grads.picked is not None:
        dz = dz.scatter_add(1, at.y, grads.picked)
    return dz + total[:, None] * (at.u if at.u.numel() else torch.ones(V, dtype=torch.float64))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", DIFFERENTIABLE_STATS)
def test_the_gradient_of_a_statistic_is_autograds(name: str, weighted: bool) -> None:
    at = logits(weighted)
    values = {statistic.name: statistic.of(at) for statistic in STATISTICS}
    g = torch.randn_like(values[name])
    (expected,) = torch.autograd.grad(values[name], at.z, g)
    actual = by_formula(at, RowGrads(**{name: g}), RowStats(**values))
    torch.testing.assert_close(actual, expected)


def test_gradients_of_several_statistics_add_up() -> None:
    at = logits(weighted=True)
    values = {statistic.name: statistic.of(at) for statistic in STATISTICS}
    upstream = {name: torch.randn_like(values[name]) for name in DIFFERENTIABLE_STATS}
    outputs = [values[name] for name in upstream]
    (expected,) = torch.autograd.grad(outputs, at.z, list(upstream.values()))
    torch.testing.assert_close(by_formula(at, RowGrads(**upstream), RowStats(**values)), expected)


def test_the_gradient_of_the_squared_lse_is_twice_the_lse() -> None:
    at = logits(weighted=False)
    values = {statistic.name: statistic.of(at) for statistic in STATISTICS}
    g = torch.randn(N, dtype=torch.float64)
    (expected,) = torch.autograd.grad(values["lse"] ** 2, at.z, g)
    torch.testing.assert_close(by_formula(at, RowGrads(square=g), RowStats(**values)), expected)


def test_every_statistic_comes_with_what_its_gradient_reads() -> None:
    for statistic in STATISTICS:
        assert with_companions(frozenset({statistic.name})) >= {statistic.name, *statistic.reads}


def test_names_of_statistics_are_fields_of_the_results() -> None:
    assert {statistic.name for statistic in STATISTICS} == set(RowStats._fields) - {"tie"}
    assert set(RowGrads._fields) == {*DIFFERENTIABLE_STATS, "square"}
