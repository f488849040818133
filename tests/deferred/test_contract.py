"""A deferred tensor stands for what eager code made at the same moment: its numbers, its history, its modes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.deferred.heads import Model, T, V, deferring, tokens
from tests.deferred.losses import LOSSES, ROWS, Y, same
from tests.eager_stack import backend


@pytest.mark.parametrize("loss", LOSSES)
def test_logits_made_without_gradients_have_none(loss: str) -> None:
    def run(forward: Any, model: Model) -> Tensor:
        with torch.no_grad():
            z = forward()
        return LOSSES[loss](z)

    assert same(run)[1] is False


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_switched_on_again_do_not_bring_them_back(loss: str) -> None:
    def run(forward: Any, model: Model) -> Tensor:
        with torch.no_grad():
            z = forward()
            with torch.enable_grad():
                return LOSSES[loss](z)

    assert same(run)[1] is False


@pytest.mark.parametrize("loss", LOSSES)
def test_a_forward_with_gradients_inside_of_no_grad_has_them(loss: str) -> None:
    def run(forward: Any, model: Model) -> Tensor:
        with torch.no_grad(), torch.enable_grad():
            z = forward()
        return LOSSES[loss](z)

    assert same(run)[1] is True


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("at_first", [False, True])
def test_a_head_is_as_frozen_as_it_was_at_the_forward(loss: str, at_first: bool) -> None:
    def run(forward: Any, model: Model) -> Tensor:
        model.lm_head.requires_grad_(at_first)
        z = forward()
        model.lm_head.requires_grad_(not at_first)
        return LOSSES[loss](z)

    assert (same(run)[3][-1] is not None) == at_first


@pytest.mark.parametrize("loss", LOSSES)
def test_a_head_that_is_frozen_at_the_backward_gets_no_gradient(loss: str) -> None:
    def run(forward: Any, model: Model) -> Tensor:
        value = LOSSES[loss](forward())
        model.lm_head.requires_grad_(False)
        value.backward()
        return value.detach()

    assert same(run)[3][-1] is None


def test_a_divergence_from_logits_of_the_same_weights_made_without_gradients() -> None:
    def run(forward: Any, model: Model) -> Tensor:
        with torch.no_grad():
            before = forward() * 0.5
        return F.kl_div(forward().log_softmax(-1), before.log_softmax(-1), log_target=True, reduction="batchmean")

    same(run)


def test_a_ratio_to_log_probabilities_of_the_same_weights() -> None:
    def log_probability(z: Tensor) -> Tensor:
        return z.log_softmax(-1).gather(-1, Y[..., None])

    def run(forward: Any, model: Model) -> Tensor:
        with torch.no_grad():
            old = forward()
        return -(log_probability(forward()) - log_probability(old)).exp().mean()

    same(run)


@pytest.mark.parametrize("loss", LOSSES)
def test_logits_made_in_inference_mode_may_be_read_outside(loss: str) -> None:
    def run(forward: Any, model: Model) -> Tensor:
        with torch.inference_mode():
            z = forward()
        assert z.is_inference()
        return LOSSES[loss](z)

    assert same(run)[1] is False


@pytest.mark.parametrize("loss", LOSSES)
def test_a_metric_in_inference_mode_is_an_inference_tensor(loss: str) -> None:
    def run(forward: Any, model: Model) -> Tensor:
        z = forward()
        value = LOSSES[loss](z)
        with torch.inference_mode():
            return LOSSES[loss](z) + value.detach()

    same(run)


@pytest.mark.parametrize("use", [
    lambda z, w: F.kl_div((w @ w.T).log_softmax(-1)[:1], z.flatten(0, 1)[:1, :V].softmax(-1)),
    lambda z, w: (z * w.sum()).logsumexp(-1).mean(),
    lambda z, w: F.cross_entropy(z.flatten(0, 1) * w.mean(), Y.flatten()),
])  # fmt: skip
def test_logits_made_in_inference_mode_cannot_be_differentiated_around(use: Any) -> None:
    def run(forward: Any, model: Model) -> Tensor:
        with torch.inference_mode():
            z = forward()
        return use(z, model.lm_head.weight)

    same(run)


def test_a_student_of_a_teacher_in_inference_mode_is_eager_codes_error() -> None:
    def run(forward: Any, model: Model) -> Tensor:
        with torch.inference_mode():
            teacher = forward().softmax(-1)
        return F.kl_div(forward().log_softmax(-1), teacher, reduction="batchmean")

    assert same(run)[0] is RuntimeError


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("compiler", ["pass", "aot_eager"])
def test_a_compiled_loss_gives_the_gradients_that_its_logits_have(compiler: str) -> None:
    model, x = Model(), tokens(ROWS)
    run, with_pass = deferring(model), backend(lambda report: None)
    loss = torch.compile(LOSSES["cross_entropy"], backend=with_pass if compiler == "pass" else compiler)
    for frozen in (True, False, True):
        results = []
        for forward, f in ((model, LOSSES["cross_entropy"]), (run, loss)):
            model.zero_grad()
            model.lm_head.requires_grad_(not frozen)
            z = forward(x)
            model.lm_head.requires_grad_(frozen)
            value = f(z)
            model.lm_head.requires_grad_(True)
            value.backward()
            results.append([p.grad for p in model.parameters()])
        torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-6)


class Tripled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        return z.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 3 * grad


def overwritten(z: Tensor) -> Tensor:
    view = z.view(-1, V)
    z[..., 3] = 0.5
    view[0] = 1.0
    return z


@pytest.mark.parametrize("before", [
    overwritten,
    lambda z: z.detach().requires_grad_() * 1 + z,
    lambda z: overwritten(z * 2),
    lambda z: overwritten(z).detach_().requires_grad_() + z[0, 0, 0],
    lambda z: z.sin().sum() + z,
])  # fmt: skip
def test_an_autograd_function_gets_the_history_after_a_write(before: Any) -> None:
    """It asks the tensor in C++, past everything that stands for it."""
    same(lambda forward, model: Tripled.apply(before(forward())).pow(2).mean())


def test_an_autograd_function_of_a_leaf_of_the_logits_gives_it_its_gradient() -> None:
    model, x = Model(), tokens(ROWS)
    results = []
    for forward in (model, deferring(model)):
        leaf = forward(x).detach().requires_grad_()
        Tripled.apply(leaf).pow(2).mean().backward()
        results.append(leaf.grad)
    torch.testing.assert_close(results[1], results[0])


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "viewed": lambda z: z.view(-1, V),
    "sliced": lambda z: z[:, 1:],
    "chunk": lambda z: z.chunk(2)[1],
    "detached": lambda z: z.detach(),
    "data": lambda z: z.data,
    "scaled": lambda z: z * 2,
    "viewed and scaled": lambda z: z.view(-1, V) * 2,
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("view", VIEWS)
def test_a_view_made_without_gradients_says_of_itself_what_eager_codes_says(view: str, mode: Any) -> None:
    model, x = Model(), tokens(ROWS)
    results = []
    for forward in (model, deferring(model)):
        z = forward(x)
        with mode():
            v = VIEWS[view](z)
            best = v.argmax(-1)
        loss = v.logsumexp(-1).mean() if not v.is_inference() else None
        own = loss is not None and loss.requires_grad
        if own:
            loss.backward()
        results.append((v.requires_grad, v.is_leaf, v.is_inference(), best, loss, v.grad if own else None))
        results[-1] += tuple(p.grad for p in model.parameters())
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_view_of_logits_that_were_written_to_enters_a_compiled_function() -> None:
    compiled = torch.compile(LOSSES["cross_entropy"], backend=backend(lambda report: None))
    model, x = Model(), tokens(ROWS)
    values = []
    for forward, loss in ((model, LOSSES["cross_entropy"]), (deferring(model), compiled)):
        z = forward(x)
        view = z.view(ROWS, T, V)
        z.index_fill_(-1, torch.tensor([3]), -2.0)
        values.append(loss(view).detach())
    torch.testing.assert_close(values[1], values[0])
