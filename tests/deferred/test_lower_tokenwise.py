"""Losses outside of the compiled model that no statistic answers: computed token by token, eagerly and equally right.

A student's logits are deferred; a teacher's are deferred too, of another model, or a tensor. Each function is our own
rendering of a form in patterns of distillation and alignment code; none may make a tensor of the logits' size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fusedhead.deferred.graph_outputs import StaleLogits
from fusedhead.report.report import Report
from tests.deferred.heads import B, Model, Operations, T, V, compare, deferring, gradients, is_deferred, tokens
from tests.deferred.outside_divergences import (
    AT_ONCE,
    BOTH_WAYS,
    CASES,
    ENDS_IN_A_LOSS,
    ON_A_TENSOR,
    Form,
    log_target_kl,
    reverse_kl,
)
from tests.eager_stack import backend


@pytest.mark.parametrize(("form", "teacher"), CASES, ids=lambda value: getattr(value, "__name__", value))
def test_a_divergence_outside_builds_no_logits(form: Form, teacher: str) -> None:
    student, other, x = Model(), Model(), tokens()
    target = other(x).detach().log_softmax(-1)
    targets = deferring(other)(x).detach().log_softmax(-1) if teacher == "deferred" else target
    expected = form(student(x), target)
    wanted = gradients(student, expected)
    s = deferring(student)(x)
    with Operations() as ran:
        value = form(s, targets)
        found = gradients(student, value)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-7)
    assert ran.fused == (AT_ONCE if form in ENDS_IN_A_LOSS else BOTH_WAYS)
    assert set(ran.large) <= (set() if teacher == "deferred" else ON_A_TENSOR)
    assert is_deferred(s)


def test_both_models_may_learn_from_each_other() -> None:
    models, x = torch.nn.ModuleList([Model(), Model()]), tokens()
    wanted = gradients(models, reverse_kl(models[0](x), models[1](x).log_softmax(-1)))
    s, t = deferring(models[0])(x), deferring(models[1])(x)
    with Operations() as ran:
        value = reverse_kl(s, t.log_softmax(-1))
        found = gradients(models, value)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-7)
    assert (ran.fused, ran.large) == (BOTH_WAYS, [])


def test_bfloat16_is_as_right_as_eager() -> None:
    student, other, x = Model(dtype=torch.bfloat16), Model(dtype=torch.bfloat16), tokens()

    def loss(s: Tensor, t: Tensor) -> Tensor:
        return F.kl_div(s.float().log_softmax(-1), t.float().softmax(-1), reduction="batchmean")

    eager = loss(student(x), other(x).detach())
    wanted = gradients(student, eager)
    fused = loss(deferring(student)(x), deferring(other)(x).detach())
    found = gradients(student, fused)
    true = loss(student.double()(x), other.double()(x).detach())
    truth = gradients(student, true)
    assert abs(fused.double() - true) <= abs(eager.double() - true) + 1e-6
    for got, want, exact in zip(found, wanted, truth, strict=True):
        assert (got.double() - exact).norm() <= (want.double() - exact).norm() * 1.01 + 1e-6


def test_the_best_classes_of_every_token() -> None:
    model, x = Model(), tokens()
    z, real = deferring(model)(x), model(x)
    with Operations() as ran:
        best = z.topk(5, dim=-1)
        found = gradients(model, best.values.logsumexp(-1).sum())
        hits = (z.detach().topk(3, -1).indices == x.unsqueeze(-1)).any(-1).float().mean()
    expected = real.topk(5, dim=-1)
    torch.testing.assert_close(best.values, expected.values)
    assert torch.equal(best.indices, expected.indices)
    torch.testing.assert_close(found, gradients(model, expected.values.logsumexp(-1).sum()), rtol=1e-4, atol=1e-7)
    assert hits == (real.topk(3, -1).indices == x.unsqueeze(-1)).any(-1).float().mean()
    assert (ran.fused, ran.large) == ([*BOTH_WAYS, "head_rows"], [])


@pytest.mark.parametrize("broken", [False, True])
def test_a_check_for_numbers_builds_no_logits(broken: bool) -> None:
    model, x = Model(), tokens()
    if broken:
        with torch.no_grad():
            model.lm_head.weight[7, 3] = float("nan")
    z = deferring(model)(x)
    with Operations() as ran:
        assert bool(torch.isnan(z).any()) is broken
        assert bool(torch.isfinite(z).all()) is not broken
    assert (ran.fused, ran.large) == (["head_rows"] * 2, [])


def test_a_distribution_of_the_logits_builds_none() -> None:
    def loss(z: Tensor) -> Tensor:
        policy = torch.distributions.Categorical(logits=z, validate_args=False)
        return -policy.log_prob(torch.arange(B * T).view(B, T)).mean() - 0.1 * policy.entropy().mean()

    assert compare(Model(), loss, tokens()).large == []


def test_confident_tokens_weigh_more() -> None:
    """LLaMA-Factory's EAFT: the entropy among the best classes weighs each token's loss."""
    y = torch.arange(B * T) * 7

    def loss(z: Tensor) -> Tensor:
        best = z.detach().topk(20, dim=-1).values
        lp = best - torch.logsumexp(best, dim=-1, keepdim=True)
        weight = -(lp.exp() * lp).sum(-1) / 3
        return (F.cross_entropy(z.view(-1, V), y, reduction="none") * weight.view(-1)).mean()

    ran = compare(Model(), loss, tokens())
    assert ran.large == []
    assert "head_rows" in ran.fused


def test_without_gradients() -> None:
    student, other, x = Model(), Model(), tokens(16, 6)
    with torch.no_grad():
        expected = log_target_kl(student(x), other(x).log_softmax(-1))
        s, t = deferring(student)(x), deferring(other)(x)
        with Operations() as ran:
            value = log_target_kl(s, t.log_softmax(-1))
    torch.testing.assert_close(value, expected)
    assert (ran.fused, ran.large) == (["head_rows"], [])


def test_ambient_autocast_means_what_it_means_in_eager_code() -> None:
    student, other, x = Model(), Model(), tokens()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = reverse_kl(student(x), other(x).detach().log_softmax(-1))
        s, t = deferring(student)(x), deferring(other)(x).detach()
        with Operations() as ran:
            value = reverse_kl(s, t.log_softmax(-1))
    assert value.dtype == expected.dtype
    torch.testing.assert_close(value, expected, rtol=1e-2, atol=0)
    assert (ran.fused, ran.large) == (["head_rows"], [])


def test_few_logits_are_built_as_eager_code_builds_them() -> None:
    """Token by token costs time; below the size from which it pays, the plain tensor is computed once."""
    student, other, x = Model(), Model(), tokens(8, 128)  # enough for a head to be deferred, too few for rows
    run = [
        torch.compile(m, backend=backend(Report().extend, **{"fusedhead.min_logits": "auto"})) for m in (student, other)
    ]
    s, t = run[0](x), run[1](x).detach()
    assert is_deferred(s)
    with Operations() as ran:
        value = log_target_kl(s, t.log_softmax(-1))
    torch.testing.assert_close(value, log_target_kl(student(x), other(x).detach().log_softmax(-1)))
    assert ran.fused == []
    assert not is_deferred(s)


def test_other_numbers_of_tokens_are_not_learnt_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from fusedhead.deferred import query as deferred_request

    student, other, readings = Model(), Model(), []
    original = deferred_request.read_call
    monkeypatch.setattr(deferred_request, "read_call", lambda *given: readings.append(given) or original(*given))
    runs = deferring(student, dynamic=True), deferring(other, dynamic=True)
    for rows, length in ((2, 6), (3, 7), (5, 11), (4, 9)):
        x = tokens(rows, length)
        value = log_target_kl(runs[0](x), runs[1](x).detach().log_softmax(-1))
        torch.testing.assert_close(value, log_target_kl(student(x), other(x).detach().log_softmax(-1)))
    assert len(readings) <= 2


@pytest.mark.parametrize("teacher", ["deferred", "a tensor"])
def test_a_teacher_written_to_later_was_read_when_it_was_given(teacher: str) -> None:
    student, other, x = Model(), Model(), tokens()
    target = other(x).detach().log_softmax(-1)
    targets = deferring(other)(x).detach().log_softmax(-1) if teacher == "deferred" else target.clone()
    each = F.kl_div(deferring(student)(x).log_softmax(-1), targets, log_target=True, reduction="none")
    assert is_deferred(each)
    targets.zero_()
    real = F.kl_div(student(x).log_softmax(-1), target, log_target=True, reduction="none")
    torch.testing.assert_close(each.sum(), real.sum())
    torch.testing.assert_close(each + 0, real)


def test_a_teacher_that_moved_on_is_named() -> None:
    student, other, x = Model(), Model(), tokens()
    each = deferring(student)(x).log_softmax(-1) - deferring(other)(x).log_softmax(-1)
    with torch.no_grad():
        other.lm_head.weight.add_(1)
    with pytest.raises(StaleLogits, match=r"lm_head.weight.*changed in place"):
        each.abs().sum()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_divergence_compiled_on_its_own_sees_both_heads() -> None:
    student, other, x, report = Model(), Model(), tokens(), Report()
    wanted = gradients(student, reverse_kl(student(x), other(x).detach().log_softmax(-1)))

    def loss(s: Tensor, t: Tensor) -> Tensor:
        return reverse_kl(s, t.log_softmax(-1))

    compiled = torch.compile(loss, backend=backend(report.extend), fullgraph=True)
    s, t = deferring(student)(x), deferring(other)(x).detach()
    torch.testing.assert_close(gradients(student, compiled(s, t)), wanted, rtol=1e-4, atol=1e-7)
    assert [head.fused for head in report.heads] == [True, True]
    assert "head_rows" in report.after
    assert is_deferred(s)


LIKE: dict[str, Callable[[Tensor], Any]] = {
    "zeros_like": torch.zeros_like,
    "full_like": lambda z: torch.full_like(z, 0.1, dtype=torch.float64),
    "new_zeros": lambda z: z.new_zeros(3, 2),
    "type_as": lambda z: torch.arange(3).type_as(z),
    "to": lambda z: torch.arange(3).to(z),
    "view_as": lambda z: torch.ones(B * T, V).view_as(z),
}


@pytest.mark.parametrize("make", LIKE)
def test_a_tensor_like_the_logits_needs_none_of_them(make: str) -> None:
    model, x = Model(), tokens()
    z = deferring(model)(x)
    made, expected = LIKE[make](z), LIKE[make](model(x))
    assert type(made) is Tensor
    assert torch.equal(made, expected)
    assert (made.dtype, made.stride()) == (expected.dtype, expected.stride())
    assert is_deferred(z)


def test_targets_smoothed_by_hand() -> None:
    """As in translation: a distribution scattered around each label, made like the log-probabilities."""
    y = torch.arange(B * T) * 7 % V

    def loss(z: Tensor) -> Tensor:
        lp = z.view(-1, V).log_softmax(-1)
        target = torch.full_like(lp, 0.1 / (V - 1)).scatter_(1, y.unsqueeze(1), 0.9)
        return F.kl_div(lp, target, reduction="sum") / B

    ran = compare(Model(), loss, tokens())
    assert ran.fused == AT_ONCE
    assert set(ran.large) <= {"empty_strided", "full_like", "scatter_", "view"}  # the program's own
