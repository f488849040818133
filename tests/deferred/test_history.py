"""Autograd and deferred logits: gradients asked of them, through them, and beside them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.deferred.heads import (
    B,
    Model,
    Reversed,
    T,
    V,
    WithLoss,
    compare,
    deferring,
    gradients,
    is_deferred,
    tokens,
)  # fmt: skip

ASKED = {
    "retain_grad": lambda z, loss: z.retain_grad(),
    "register_hook": lambda z, loss: z.register_hook(lambda g: g * 0),
    "autograd.grad": lambda z, loss: torch.autograd.grad(loss, z),
    "autograd.grad, perhaps unused": lambda z, loss: torch.autograd.grad(loss, inputs=[z], allow_unused=True),
}


@pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED)
def test_a_gradient_that_is_asked_for_after_the_loss_is_an_error_with_the_remedy(
    model: Model, asked: Callable[[Tensor, Tensor], Any]
) -> None:
    z = deferring(model)(tokens())
    loss = F.cross_entropy(z.view(-1, V), tokens().view(-1))
    with pytest.raises(RuntimeError, match=r"after a loss was taken.*before the loss.*FUSEDHEAD_LOGITS=eager"):
        asked(z, loss)


def test_a_gradient_that_is_asked_for_before_the_loss_is_that_of_eager_code(model: Model) -> None:
    x, y = tokens(), tokens().view(-1)
    z, expected = deferring(model)(x), model(x)
    for logits in (z, expected):
        with torch.no_grad():
            F.cross_entropy(logits.view(-1, V), y)  # no gradient passes them by
        logits.retain_grad()
        F.cross_entropy(logits.view(-1, V), y).backward()
    torch.testing.assert_close(z.grad, expected.grad)


def test_deferred_logits_of_which_a_loss_was_taken_can_still_be_differentiated_themselves(model: Model) -> None:
    x = tokens()
    z, expected = deferring(model)(x), model(x)
    F.cross_entropy(z.view(-1, V), x.view(-1))
    w, up = model.lm_head.weight, torch.ones(B, T, V)
    (got,), (want,) = (torch.autograd.grad(logits, w, up) for logits in (z, expected))
    torch.testing.assert_close(got, want)


def halved_without_gradients(z: Tensor) -> tuple[Tensor, Tensor]:
    loss = F.cross_entropy(z.view(-1, V), torch.zeros(z.shape[:-1].numel(), dtype=torch.long))
    with torch.no_grad():
        return loss, z / 2


def test_what_is_made_of_them_under_no_grad_in_the_graph_carries_no_gradient() -> None:
    model = Model(halved_without_gradients)
    x = tokens()
    loss, z = deferring(model)(x)
    assert is_deferred(z)
    assert not z.requires_grad
    assert not F.cross_entropy(z.view(-1, V), tokens().view(-1)).requires_grad
    loss.backward()
    torch.testing.assert_close(z + 0, model(x)[1])


def test_evaluation_without_gradients(model: Model) -> None:
    compiled, x = deferring(model.eval()), tokens(16, 6)
    with torch.no_grad():
        z = compiled(x)
        loss = F.cross_entropy(z.view(-1, V), x.view(-1))
        assert is_deferred(z)
        torch.testing.assert_close(loss, F.cross_entropy(model(x).view(-1, V), x.view(-1)))
    with torch.inference_mode():
        z = compiled(x)
        torch.testing.assert_close(z.argmax(-1), model(x).argmax(-1))
        torch.testing.assert_close(z + 0, model(x))


def test_without_gradients_recorded_in_a_forward_with_them(model: Model) -> None:
    """Metrics on the training logits, under no_grad."""
    x = tokens()
    z, real = deferring(model)(x), model(x)
    with torch.no_grad():
        accuracy = (z.argmax(-1) == x).float().mean()
        entropy = torch.distributions.Categorical(logits=z).entropy()
        scaled = z * 2
    assert accuracy == (real.argmax(-1) == x).float().mean()
    torch.testing.assert_close(entropy, torch.distributions.Categorical(logits=real.detach()).entropy())
    assert not scaled.requires_grad
    torch.testing.assert_close(gradients(model, z.pow(2).sum()), gradients(model, model(x).pow(2).sum()))


X = torch.arange(B * T).reshape(B, T)


def test_gradients_through_the_loss_in_the_graph_and_the_logits_outside() -> None:
    model, x = WithLoss(), tokens()

    def total(output: dict[str, Any]) -> Tensor:
        return output["loss"] + (output["logits"] ** 2).mean() + torch.logsumexp(output["logits"], -1).mean()

    wanted = gradients(model, total(model(x, x)))
    actual = gradients(model, total(deferring(model)(x, x)))
    torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-6)


def test_a_gradient_of_the_logits_themselves_may_be_kept(model: Model) -> None:
    z, real = deferring(model)(X), model(X)
    for logits in (z, real):
        logits.retain_grad()
        F.cross_entropy(logits.view(-1, V), X.view(-1)).backward()
    torch.testing.assert_close(z.grad, real.grad)


def test_a_detached_leaf_of_the_logits_has_its_own_gradient(model: Model) -> None:
    z, real = deferring(model)(X), model(X)
    results = []
    for logits in (z, real):
        leaf = logits.detach().requires_grad_()
        F.cross_entropy(leaf.view(-1, V), X.view(-1)).backward()
        results.append(gradients_of_backward(model, logits, leaf.grad))
    torch.testing.assert_close(results[0], results[1])


def gradients_of_backward(model: nn.Module, logits: Tensor, grad: Tensor) -> list[Tensor]:
    for parameter in model.parameters():
        parameter.grad = None
    logits.backward(grad)
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def test_autograd_walkers_find_the_parameters_behind_it(model: Model) -> None:
    """DDP with find_unused_parameters walks grad_fn of every tensor in the output."""
    from torch.nn.parallel.distributed import _find_tensors

    z = deferring(model)(X)
    (result,) = _find_tensors({"logits": [z]})
    seen, stack, leaves = set(), [result.grad_fn], []
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        stack.extend(following for following, _ in node.next_functions)
    assert {id(p) for p in leaves} == {id(p) for p in model.parameters()}
    assert is_deferred(z)


def test_a_gradient_that_another_function_defines_counts(model: Model) -> None:
    compare(model, lambda z: F.cross_entropy(Reversed.apply(z).view(-1, V), X.view(-1)), X)


def test_deferred_logits_of_two_forwards_may_meet(model: Model) -> None:
    compiled, other = deferring(model), X.flip(0)
    z, w = compiled(X), compiled(other)
    torch.testing.assert_close(
        F.kl_div(F.log_softmax(z, -1), F.log_softmax(w, -1), log_target=True, reduction="sum"),
        F.kl_div(F.log_softmax(model(X), -1), F.log_softmax(model(other), -1), log_target=True, reduction="sum"),
    )
    assert torch.cat([compiled(X), compiled(other)]).shape == (2 * B, T, V)
