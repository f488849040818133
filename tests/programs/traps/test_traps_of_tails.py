"""Traps of what lies between the losses and the scalar: gradients taken early must be those of this very program.

A tail that draws random numbers, or whose factors are made under another grad mode or autocast, is computed again in
the backward, or its head is left alone. Never is a number drawn twice or a gradient let through where none flows.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.capabilities import hook_op
from tests.eager_stack import Rewritten
from tests.programs.claims import D, Program, V, hidden, labels, right, weight


def losses(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(h, w), y, reduction="none")


def recomputed(program: Program, *inputs: Tensor, because: str) -> None:
    (head,) = right(program, hidden(6, D), weight(), labels(6), *inputs).heads
    assert "recompute in the backward" in head.engine
    assert because in head.engine


@pytest.mark.parametrize("drop", [F.dropout, F.alpha_dropout, torch.nn.Dropout(0.5)])
def test_losses_that_are_dropped_at_random_are_dropped_once(drop) -> None:  # type: ignore[no-untyped-def]
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        if isinstance(drop, torch.nn.Module):
            return drop(losses(h, w, y)).sum()
        return drop(losses(h, w, y), 0.5, training=True).sum()

    recomputed(program, because="draws random numbers, and a gradient would draw others")


def test_random_factors_drawn_after_the_head_are_drawn_in_order() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor, x: Tensor) -> Tensor:
        each = losses(h, w, y)
        dropped = F.dropout(x, 0.5)
        return (each * torch.rand(6)).sum() + dropped.sum()

    recomputed(program, hidden(6), because="may draw random numbers after the head")


def test_random_factors_drawn_before_the_head_are_known_to_it() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        factors = torch.rand(6)
        return (losses(h, w, y) * factors).sum()

    (head,) = right(program, hidden(6, D), weight(), labels(6)).heads
    assert "gradients in the forward sweep" in head.engine


def test_random_logits_and_rows_are_right() -> None:
    def noisy(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        z = F.linear(h, w)
        return F.cross_entropy(z + torch.randn(z.shape), y)

    def picked(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return losses(h, w, y)[torch.randperm(6)[:3]].mean()

    def shuffled(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(h, w)[torch.randperm(6)], y)

    def relabelled(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        z = F.linear(h, w)
        return F.cross_entropy(z, torch.where(torch.rand(6) < 0.5, y, -100))

    for program in (noisy, picked, shuffled, relabelled):
        right(program, hidden(6, D), weight(), labels(6))


def test_factors_made_without_gradients_get_none() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor, x: Tensor) -> Tensor:
        each = losses(h, w, y)
        with torch.no_grad():
            factors = x * 2
        return (each * factors).sum()

    recomputed(program, hidden(6), because="is computed where no gradient is recorded")


def test_a_count_taken_without_gradients_is_taken_early() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        each = losses(h, w, y)
        with torch.no_grad():
            count = mask.sum().clamp(min=1)
        return (each * mask).sum() / count

    (head,) = right(program, hidden(6, D), weight(), labels(6), torch.rand(6)).heads
    assert "gradients in the forward sweep" in head.engine


def test_factors_made_under_autocast_are_as_rounded_as_they_were() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Tensor:
        each = losses(h, w, y)
        with torch.autocast("cpu", torch.bfloat16):
            factors = a @ b
        return (each * factors).sum()

    recomputed(program, torch.randn(6, 6), torch.randn(6), because="is computed under another autocast")


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_hook_on_the_loss_sees_its_gradient() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        loss = losses(h, w, y).mean()
        loss.register_hook(lambda g: g * 3)
        return loss

    right(program, hidden(6, D), weight(), labels(6))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_hook_on_the_losses_of_tokens_sees_their_gradients() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        each = losses(h, w, y)
        each.register_hook(lambda g: g * torch.arange(6))
        return each.mean()

    recomputed(program, because=f"{hook_op()} takes the loss")


def test_a_loss_kept_under_another_name_sees_what_is_added_in_place() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        loss = losses(h, w, y).mean()
        shown = loss.detach()
        loss += h.pow(2).mean()
        loss /= 4
        return loss, shown

    right(program, hidden(6, D), weight(), labels(6))


@pytest.mark.parametrize("how", ["in place", "through a view", "without gradients"])
def test_losses_that_are_scaled_in_place_are_right(how: str) -> None:
    def program(h: Tensor, w: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        each = losses(h, w, y)
        if how == "in place":
            each *= mask
        elif how == "through a view":
            each.view(2, 3).mul_(mask.view(2, 3))
        else:
            with torch.no_grad():
                each.mul_(mask)
        return each.sum() / mask.sum()

    right(program, hidden(6, D), weight(), labels(6), torch.rand(6))


def test_losses_that_the_program_sorts_or_weighs_by_themselves_are_right() -> None:
    def hardest(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return losses(h, w, y).topk(3).values.mean()

    def focal(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        each = losses(h, w, y)
        return ((1 - (-each).exp()) ** 2 * each).mean()

    def unlikely(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        lp = F.linear(h, w).log_softmax(-1)
        negatives = torch.tensor([[0, V - 1]]).expand(6, 2)
        return F.nll_loss(lp, y) - (1 - lp.exp().gather(1, negatives)).clamp(min=1e-5).log().sum(-1).mean()

    for program in (hardest, focal, unlikely):
        right(program, hidden(6, D), weight(), labels(6))


def test_looking_for_random_numbers_draws_none() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return (losses(h, w, y) * torch.rand(6)).sum()

    inputs = hidden(6, D), weight(), labels(6)
    before = torch.get_rng_state()
    rewritten = Rewritten(program)
    got = rewritten(*inputs)
    after = torch.get_rng_state()
    torch.set_rng_state(before)
    torch.testing.assert_close(got, program(*inputs))
    assert torch.equal(torch.get_rng_state(), after)
