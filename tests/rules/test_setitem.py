"""Writes to part of the logits, in the graph and on deferred logits: MDLM's SUBS parameterisation and its pieces."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fusedhead.deferred.graph_outputs import DeferredLogits
from tests.eager_stack import Rewritten
from tests.rules.diffusion import MASK_CLASS, X0, XT, B, D, Model, T, V, gradients


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


def subs(z: Tensor) -> Tensor:
    """MDLM (Sahoo et al., 2024), ``_subs_parameterization`` and its loss."""
    z[:, :, MASK_CLASS] += -1000000.0
    z = z - torch.logsumexp(z, dim=-1, keepdim=True)
    unmasked = XT != MASK_CLASS
    z[unmasked] = -1000000.0
    z[unmasked, XT[unmasked]] = 0
    return -(torch.gather(z, -1, X0[:, :, None]).squeeze(-1) * 0.7).sum() / X0.numel()


@pytest.mark.parametrize("after", FUSED + OTHERS)
def test_in_the_graph(after: Callable[[Tensor], Tensor]) -> None:
    model, x = Model(after), torch.randn(B, T, D)
    run = Rewritten(model)
    torch.testing.assert_close(gradients(model, run(x)), gradients(model, model(x)), rtol=1e-4, atol=1e-6)
    if after in FUSED:
        assert [(head.fused, head.reason) for head in run.report.heads] == [(True, "")]


@pytest.mark.parametrize("after", [*FUSED, *OTHERS, subs])
def test_on_deferred_logits(after: Callable[[Tensor], Tensor]) -> None:
    model, x = Model(), torch.randn(B, T, D)
    z = Rewritten(model)(x)
    assert isinstance(z, DeferredLogits)
    torch.testing.assert_close(gradients(model, after(z)), gradients(model, after(model(x))), rtol=1e-4, atol=1e-6)
    assert (z._plain is None) == (after in (*FUSED, read_again, subs))


def test_the_tensor_after_the_write_is_the_one_of_eager_code() -> None:
    model, x = Model(), torch.randn(B, T, D)
    z, wanted = Rewritten(model)(x), model(x)
    for each in (z, wanted):
        part = each[:, :, 3]
        part += 1.5
        each[..., :3] *= 2
        each[XT != MASK_CLASS] = 0.0
    torch.testing.assert_close(z + 0, wanted)
    torch.testing.assert_close(gradients(model, z.sin().sum()), gradients(model, wanted.sin().sum()))


def test_an_offset_that_learns_gets_its_gradient() -> None:
    model, x = Model(), torch.randn(B, T, D)
    z, wanted = Rewritten(model)(x), model(x)
    for each in (z, wanted):
        each[:, :, 3] += model.offset
    found = gradients(model, loss(z))
    assert z._plain is None
    torch.testing.assert_close(found, gradients(model, loss(wanted)), rtol=1e-4, atol=1e-6)


def test_without_gradients_a_write_to_logits_that_have_some_raises_as_in_eager_code_or_computes() -> None:
    model, x = Model(), torch.randn(B, T, D)
    z, wanted = Rewritten(model)(x), model(x)
    for each in (z, wanted):
        with torch.no_grad():
            each[:, :, 3] += 1.0
    torch.testing.assert_close(loss(z), loss(wanted))
