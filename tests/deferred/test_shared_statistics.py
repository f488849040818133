"""Statistics of one sweep serve later calls on the same logits, and views of them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.deferred.heads import Model, Operations, V, deferring, gradients, tokens
from tests.deferred.outside_losses import flattened


def test_accuracy_beside_the_loss_needs_no_logits() -> None:
    model, x = Model(), tokens()
    z, expected = deferring(model)(x), model(x)
    with Operations() as ran:
        loss, guess = flattened(z), z.argmax(-1)
        top = z.detach().max(-1)
    assert torch.equal(guess, expected.argmax(-1))
    assert torch.equal(top.indices, expected.max(-1).indices)
    torch.testing.assert_close(top.values, expected.max(-1).values)
    assert (ran.fused, ran.large) == (["head_loss", "head_stats", "head_stats"], [])
    loss.backward()


def test_a_loss_asked_for_twice_is_right_twice(model: Model) -> None:
    x, y = tokens(), tokens().view(-1)

    def loss(z: Tensor) -> Tensor:
        return F.cross_entropy(z.view(-1, V), y) + F.cross_entropy(z.view(-1, V), y, reduction="sum")

    wanted = gradients(model, loss(model(x)))
    torch.testing.assert_close(gradients(model, loss(deferring(model)(x))), wanted, rtol=1e-4, atol=1e-6)
