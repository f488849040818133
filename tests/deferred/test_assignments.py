"""Assignments to deferred logits: the numbers and gradients of eager code, without logits where rules read them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fusedhead.deferred.graph_outputs import DeferredLogits
from tests.eager_stack import Rewritten
from tests.rules.diffusion import MASK_CLASS, X0, XT, B, D, Model, T, gradients
from tests.rules.partial_writes import (
    FUSED,
    OTHERS,
    loss,
    read_again,
)


def subs(z: Tensor) -> Tensor:
    """MDLM (Sahoo et al., 2024), ``_subs_parameterization`` and its loss."""
    z[:, :, MASK_CLASS] += -1000000.0
    z = z - torch.logsumexp(z, dim=-1, keepdim=True)
    unmasked = XT != MASK_CLASS
    z[unmasked] = -1000000.0
    z[unmasked, XT[unmasked]] = 0
    return -(torch.gather(z, -1, X0[:, :, None]).squeeze(-1) * 0.7).sum() / X0.numel()


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
    actual = gradients(model, loss(z))
    assert z._plain is None
    torch.testing.assert_close(actual, gradients(model, loss(wanted)), rtol=1e-4, atol=1e-6)


def test_without_gradients_a_write_to_logits_that_have_some_raises_as_in_eager_code_or_computes() -> None:
    model, x = Model(), torch.randn(B, T, D)
    z, wanted = Rewritten(model)(x), model(x)
    for each in (z, wanted):
        with torch.no_grad():
            each[:, :, 3] += 1.0
    torch.testing.assert_close(loss(z), loss(wanted))
