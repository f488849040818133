"""Legality: a head stays where others take its gradient, in transforms, and where no equal rewrite is proved."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.programs.claims import D, compiled, hidden, labels, left, unseen, weight

# Dynamo looks at .grad of what crosses a graph break
LEAF = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


def test_an_angular_margin_taken_in_place_without_gradients_is_left_alone() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        cosine = F.linear(F.normalize(h), F.normalize(w)) * 0.9
        with torch.no_grad():
            target = cosine[torch.arange(6), y].arccos_() + 0.5
            cosine.arccos_()
            cosine[torch.arange(6), y] = target
            cosine.cos_()
        return F.cross_entropy(cosine * 8, y)

    left(
        program, hidden(6, D), weight(), labels(6), because="changes the logits in place where no gradient is recorded"
    )


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by Dynamo itself
def test_a_gradient_only_consumer_of_the_logits_is_left_alone() -> None:
    class LargestLogit(torch.autograd.Function):
        @staticmethod
        def forward(ctx, loss, z):  # type: ignore[no-untyped-def]
            ctx.save_for_backward(z)
            return loss.clone()

        @staticmethod
        def backward(ctx, g):  # type: ignore[no-untyped-def]
            (z,) = ctx.saved_tensors
            top, at = torch.max(z, -1, keepdim=True)
            return g, torch.zeros_like(z).scatter(-1, at, top * 1e-2)

    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        z = F.linear(h, w)
        return LargestLogit.apply(F.cross_entropy(z, y), z)

    left(program, hidden(6, D), weight(), labels(6), because="autograd.Function with a backward of its own")


@LEAF
def test_a_hook_on_the_logits_is_left_alone() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        z = F.linear(h, w)
        z.register_hook(lambda g: g * 2)
        return F.cross_entropy(z, y)

    left(program, hidden(6, D), weight(), labels(6), because="takes the logits")


@LEAF
def test_logits_that_retain_their_gradient_are_left_alone() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        z = F.linear(h, w)
        z.retain_grad()
        return F.cross_entropy(z, y)

    unseen(program, hidden(6, D), weight(), labels(6))


def test_a_backward_inside_the_program_is_left_to_dynamo() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        total = torch.zeros(())
        for hc, yc in zip(h.detach().split(3), y.split(3)):
            leaf = hc.requires_grad_()
            loss = F.cross_entropy(F.linear(leaf, w.detach()), yc)
            total = total + torch.autograd.grad(loss, leaf)[0].sum() + loss.detach()
        return total

    compiled(program, [hidden(6, D), weight(), labels(6)])


@LEAF
def test_head_and_loss_in_different_graphs_are_left_alone() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        z = F.linear(h, w)
        torch._dynamo.graph_break()
        return F.cross_entropy(z, y)

    unseen(program, hidden(6, D), weight(), labels(6), options={"fusedhead.logits": "eager"})


class AlreadyFused(torch.autograd.Function):
    """A head that computes its gradients itself, as Liger's and others do."""

    @staticmethod
    def forward(ctx, h, w, y):  # type: ignore[no-untyped-def]
        z = h @ w.t()
        dz = z.softmax(-1) - F.one_hot(y, len(w))
        ctx.save_for_backward(dz @ w, dz.t() @ h)
        return F.cross_entropy(z, y, reduction="sum")

    @staticmethod
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        dh, dw = ctx.saved_tensors
        return g * dh, g * dw, None


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by Dynamo itself
def test_a_head_that_is_fused_already_is_left_alone() -> None:
    left(AlreadyFused.apply, hidden(6, D), weight(), labels(6), because="the head is inside autograd_function_apply")
