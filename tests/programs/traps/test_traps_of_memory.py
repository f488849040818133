"""Traps of outputs, aliases and in-place writes: what a naive rewrite would delete, reorder or miss.

Where the pass reads the program it is right; where it does not, it leaves the head and says why.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

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


def test_a_mask_changed_in_place_between_the_head_and_the_sum_counts() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        losses = F.cross_entropy(F.linear(h, w).view(-1, V), y.view(-1), reduction="none")
        twice = losses * 2
        mask.mul_(0.5)
        return (twice * mask).sum()

    right(program, hidden(), weight(), labels(), torch.rand(B * T))


def test_a_mask_changed_in_place_after_the_sum_is_read_before() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        losses = F.cross_entropy(F.linear(h, w).view(-1, V), y.view(-1), reduction="none")
        loss = torch.where(mask > 0.5, losses, 0.0).sum()
        mask.zero_()
        return loss

    right(program, hidden(), weight(), labels(), torch.rand(B * T))


def test_an_assignment_into_the_losses_counts() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        loss = F.cross_entropy(F.linear(h, w).view(-1, V), y.view(-1), reduction="none").view(B, T)
        loss[:, -1] = float("nan")
        return loss

    right(program, hidden(), weight(), labels())


def test_an_assignment_into_the_labels_counts() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        shifted = torch.roll(y, -1)
        shifted[:, -1] = -100
        return flat_loss(F.linear(h, w), shifted)

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


def test_labels_are_read_after_what_is_written_into_them() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        z = F.linear(h, w)
        mask = y != -100
        y[y == -100] = 0
        lp = z.log_softmax(-1).gather(2, y.unsqueeze(2)).squeeze(2)
        return (lp * mask).sum()

    y = labels()
    y[0, 1:3] = -100
    right(program, hidden(), weight(), y)


def test_labels_written_into_through_a_view_are_read_afterwards() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        padded = F.pad(y, (0, 1), value=-100)
        shifted = padded[:, 1:]
        shifted[~mask] = 0
        return flat_loss(F.linear(h, w), shifted)

    right(program, hidden(), weight(), labels(), torch.rand(B, T) > 0.3)


def test_labels_written_into_between_two_losses_are_two_sets_of_labels() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        z = F.linear(h, w).view(-1, V)
        flat = y.view(-1)
        first = F.cross_entropy(z, flat)
        y.clamp_(max=2)
        return first + F.cross_entropy(z, flat)

    left(program, torch.randn(B, T, D), torch.randn(V, D), labels(), because="clamp_ at")


def test_a_hidden_state_changed_after_the_projection_is_not_read_again() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        x = h * 2
        z = F.linear(x.detach(), w)
        x.detach().mul_(3)
        return flat_loss(z, y)

    left(program, torch.randn(B, T, D), torch.randn(V, D), labels(), because="in place before the loss")


def test_a_weight_changed_after_the_projection_is_not_read_again() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        z = F.linear(h, w)
        w.div_(w.norm(dim=1, keepdim=True))
        return flat_loss(z, y)

    left(program, torch.randn(B, T, D), torch.randn(V, D), labels(), because="in place before the loss")


def test_hidden_states_changed_after_the_loss_are_not_needed_by_a_frozen_weight() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        loss = F.cross_entropy(F.linear(h, w).view(-1, V), y.view(-1), reduction="none")
        h.detach().add_(0.1)
        return loss

    left(program, hidden(), torch.randn(V, D), labels(), because="add_ at")


def test_a_weight_changed_before_the_projection_is_read_changed() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        w.div_(w.norm(dim=1, keepdim=True))
        return flat_loss(F.linear(h, w), y)

    right(program, hidden(), torch.randn(V, D), labels())


def test_a_scale_changed_between_two_uses_is_two_scales() -> None:
    def program(h: Tensor, w: Tensor, s: Tensor, y: Tensor) -> Tensor:
        z = F.linear(h, w) * s
        s.mul_(2)
        return flat_loss(z, y)

    left(program, torch.randn(B, T, D), torch.randn(V, D), torch.ones(V), labels(), because="in place before the loss")


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


@pytest.mark.parametrize(
    "layer",
    [nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.Hardswish, nn.SiLU, nn.ELU, nn.CELU, nn.Threshold, nn.Dropout, nn.RReLU],
)
def test_a_layer_that_works_in_place_is_seen_to(layer: type[nn.Module]) -> None:
    given = {nn.Threshold: (0.1, 0.5)}.get(layer, ())
    apart, within = layer(*given), layer(*given, inplace=True)

    def program(h: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        x = h * 2
        z = F.linear(x, w)
        after = (within if writes else apart)(x)
        return flat_loss(z, y), after

    writes = True
    left(program, hidden(), torch.randn(V, D), labels(), because="in place before the loss")
    writes = False
    right(program, hidden(), torch.randn(V, D), labels())


def test_a_table_whose_rows_are_cut_to_length_is_written_to() -> None:
    def program(h: Tensor, w: Tensor, ids: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        z = F.linear(h, w)
        rows = F.embedding(ids, w, max_norm=0.5)
        return flat_loss(z, y), rows

    left(program, torch.randn(B, T, D), torch.randn(V, D), labels(3), labels(), because="embedding at")

    def free(h: Tensor, w: Tensor, ids: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        z = F.linear(h, w)
        rows = F.embedding(ids, w, 0)
        return flat_loss(z, y), rows

    right(free, torch.randn(B, T, D), torch.randn(V, D), labels(3), labels())
