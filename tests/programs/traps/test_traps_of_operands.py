"""Traps of operands that are written: labels, masks, scales, hidden states and weights count as they were when read."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.programs.claims import B, D, T, V, hidden, labels, left, right, weight


def flat_loss(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z.reshape(-1, z.size(-1)), y.reshape(-1))


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


def test_an_assignment_into_the_labels_counts() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        shifted = torch.roll(y, -1)
        shifted[:, -1] = -100
        return flat_loss(F.linear(h, w), shifted)

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


@pytest.mark.parametrize(
    "layer",
    [nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.Hardswish, nn.SiLU, nn.ELU, nn.CELU, nn.Threshold, nn.Dropout, nn.RReLU],
)
def test_a_layer_that_works_in_place_is_seen_to(layer: type[nn.Module]) -> None:
    inputs = {nn.Threshold: (0.1, 0.5)}.get(layer, ())
    apart, within = layer(*inputs), layer(*inputs, inplace=True)

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
