"""Traps of outputs, aliases and in-place writes: what a naive rewrite would delete, reorder or miss.

Where the pass reads the program it is right; where it does not, it leaves the head and says why.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.programs.claims import B, D, T, V, hidden, labels, left, right, weight

EAGER = {"fusedhead.logits": "eager"}


def flat_loss(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z.reshape(-1, z.size(-1)), y.reshape(-1))


def test_returned_logits_are_returned() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        z = F.linear(h, w)
        return flat_loss(z, y), z

    assert right(program, hidden(), weight(), labels(), options=EAGER).heads[0].logits == "built"


def test_the_returned_tensor_is_the_one_returned_not_the_projection() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z = F.linear(h, w)
        capped = 30 * torch.tanh(z / 30)
        return capped.float(), flat_loss(capped, y), (capped * 2)[:, -1:]

    right(program, hidden(), weight(), labels(), options=EAGER)


def test_logits_changed_in_place_by_every_spelling_are_right() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        z = F.linear(h, w)
        z /= 1.5
        z.mul_(0.7)
        z *= 2
        z.div_(1.25)
        return flat_loss(z, y)

    right(program, hidden(), weight(), labels())


def test_consumers_on_both_sides_of_an_in_place_step_see_what_they_saw() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        z = F.linear(h, w)
        with torch.no_grad():
            before = torch.logsumexp(z, -1)
        z.div_(2.0)
        return before, -z.log_softmax(-1).gather(-1, y.unsqueeze(-1)).mean()

    right(program, hidden(), weight(), labels())


def test_an_in_place_step_on_a_view_of_the_logits_is_left_alone() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        z = F.linear(h, w)
        z[:, :-1].div_(0.5)
        return flat_loss(z, y), z.detach().sum()

    left(program, hidden(), weight(), labels(), because="div_ changes logits that z is a view of")


def test_an_in_place_step_seen_through_an_older_view_is_left_alone() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        z = F.linear(h, w)
        flat = z.view(-1, V)
        z.mul_(0.5)
        return F.cross_entropy(flat, y.view(-1))

    left(program, hidden(), weight(), labels(), because="mul_ changes logits that flat is a view of")


def test_logits_returned_and_then_changed_in_place_are_returned_changed() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        z = F.linear(h, w)
        loss = flat_loss(z, y)
        z.detach().mul_(2)
        return loss, z

    left(program, hidden(), weight(), labels(), because="mul_ changes logits that z is a view of", options=EAGER)


def test_logits_returned_through_another_view_of_what_was_written_are_right() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        z = F.linear(h, w)
        z.mul_(0.8)
        return flat_loss(z, y), z.unsqueeze(0)

    right(program, hidden(), weight(), labels(), options=EAGER)


def test_returned_logits_with_columns_that_were_set_are_right() -> None:
    """Chameleon disallows image tokens, by their numbers."""

    def program(h: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        z = F.linear(h, w)
        z[..., [8, 10]] = -50.0
        return flat_loss(z, y % 8), z

    for options in (EAGER, {"fusedhead.logits": "deferred"}):
        right(program, hidden(), weight(), labels(), options=options)


def test_logits_written_after_their_loss_are_returned_as_written() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        z = F.linear(h, w)
        loss = flat_loss(2 * z, y)
        before = z.clone()
        z.mul_(0.8)
        return loss, torch.stack([before, z])

    left(program, hidden(), weight(), labels(), because="computed from all logits, is returned", options=EAGER)

    def apart(h: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z = F.linear(h, w)
        loss = flat_loss(2 * z, y)
        before = z.clone()
        z.mul_(0.8)
        return loss, before, z

    right(apart, hidden(), weight(), labels(), options=EAGER)


def test_logits_returned_as_they_are_after_a_step_in_place_are_right() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        z = F.linear(h, w)
        z /= 0.8
        return flat_loss(z, y), z

    right(program, hidden(), weight(), labels(), options=EAGER)


def test_classes_masked_by_assignment_are_masked() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        z = F.linear(h, w)
        z[:, :, 3:5] = torch.finfo(z.dtype).min
        return flat_loss(z, y)

    right(program, hidden(), weight(), labels(high=3))


def test_classes_that_are_set_to_nan_are_left_alone() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        z = F.linear(h, w)
        z[..., 2] = float("nan")
        return flat_loss(z, y)

    left(program, hidden(), weight(), labels(), because="logits are replaced by NaN")


def test_an_assignment_into_the_log_probabilities_of_tokens_counts() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        lp = F.linear(h, w).log_softmax(-1).gather(-1, y.unsqueeze(-1)).squeeze(-1)
        lp[mask] = 0
        return lp.sum()

    right(program, hidden(), weight(), labels(), torch.rand(B, T) > 0.5)


def test_an_assignment_into_the_losses_counts() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        loss = F.cross_entropy(F.linear(h, w).view(-1, V), y.view(-1), reduction="none").view(B, T)
        loss[:, -1] = float("nan")
        return loss

    right(program, hidden(), weight(), labels())


def test_a_step_in_place_without_gradients_keeps_its_gradient_trick() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        z = F.linear(h, w) * 0.5
        with torch.no_grad():
            z.mul_(3)
        return flat_loss(z, y)

    left(program, hidden(), weight(), labels(), because="where no gradient is recorded")


def test_a_loss_that_is_added_to_in_place_is_right() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        loss = flat_loss(F.linear(h, w), y)
        loss += 0.1 * h.pow(2).mean()
        return loss

    right(program, hidden(), weight(), labels())


def test_an_entry_of_the_output_dictionary_may_be_replaced() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> dict[str, Tensor]:
        out = {"logits": F.linear(h, w)}
        out["loss"] = flat_loss(out["logits"], y)
        out["logits"] = out["logits"].to(torch.float32).log_softmax(-1)
        return out

    for options in (EAGER, {"fusedhead.logits": "deferred"}):
        right(program, hidden(), weight(), labels(), options=options)


def test_logits_that_alias_an_input_are_not_confused() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        same = h.view(-1, D)
        return flat_loss(F.linear(same, w), y), same

    right(program, hidden(), weight(), labels())
