"""Programs that write to part of the logits: MDLM's SUBS parameterisation and its pieces."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.rules.diffusion import MASK_CLASS, X0, XT, V


def loss(z: Tensor) -> Tensor:
    return F.cross_entropy(z.flatten(0, 1), X0.flatten())


def added(z: Tensor) -> Tensor:
    z[:, :, MASK_CLASS] += -1e6
    return loss(z)


def subtracted_from_several(z: Tensor) -> Tensor:
    z[..., 3:100] -= 2.5
    return loss(z)


def scaled(z: Tensor) -> Tensor:
    z[..., :7] *= 0.5
    return loss(z)


def written_through_a_view(z: Tensor) -> Tensor:
    z[..., 5:9].add_(torch.tensor(3.0))
    return loss(z)


def set_to_infinity(z: Tensor) -> Tensor:
    z[:, :, MASK_CLASS] = -float("inf")
    return loss(z)


def normalised_by_hand(z: Tensor) -> Tensor:
    z[:, :, MASK_CLASS] += -1e6
    z = z - torch.logsumexp(z, dim=-1, keepdim=True)
    return -z.gather(-1, X0[..., None]).mean()


def nll_of_what_is_normalised_by_hand(z: Tensor) -> Tensor:
    z = z.flatten(0, 1)
    return F.nll_loss(z - z.logsumexp(-1, keepdim=True), X0.flatten())


def rows_set(z: Tensor) -> Tensor:
    z[XT != MASK_CLASS] = -1e6
    return loss(z)


def read_again(z: Tensor) -> Tensor:
    part = z[:, :, 3]
    part += 1.5
    return loss(z) + part.square().mean()


def read_before(z: Tensor) -> Tensor:
    """The part that was taken first sees the write too."""
    before, part = z[:, :, 3], z[:, :, 3]
    part += 1.5
    return loss(z) + before.square().mean()


def another_name(z: Tensor) -> Tensor:
    flat = z.view(-1, V)
    z[:, :, 3] += 1.5
    return F.cross_entropy(flat, X0.flatten())


def one_token(z: Tensor) -> Tensor:
    z[0, 0, 0] = 1.0
    z[1] *= 2
    return loss(z)


FUSED = [added, subtracted_from_several, scaled, written_through_a_view, set_to_infinity, normalised_by_hand,
         nll_of_what_is_normalised_by_hand, rows_set]  # fmt: skip


OTHERS = [read_again, read_before, another_name, one_token]
