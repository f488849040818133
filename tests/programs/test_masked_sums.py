"""Sums of tokens that a boolean mask picks of what is made of logits token by token, in one graph."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.eager_stack import Rewritten
from tests.programs.mixed_model import D, Model, N, Y, gradients

Loss = Callable[[Model, Tensor, Tensor], Tensor]


def masked_divergence(m: Model, h: Tensor, mask: Tensor) -> Tensor:
    student, teacher = F.linear(h, m.w).log_softmax(-1), F.linear(h.detach(), m.w.detach() * 0.9).log_softmax(-1)
    return F.kl_div(student, teacher, reduction="none", log_target=True)[mask].sum() / mask.sum()


def masked_and_measured(m: Model, h: Tensor, mask: Tensor) -> Tensor:
    picked = (F.linear(h, m.w).softmax(-1) ** 2)[mask]
    return picked.sum() / picked.shape[0]


def masked_mean(m: Model, h: Tensor, mask: Tensor) -> Tensor:
    return (F.linear(h, m.w).softmax(-1) ** 2 + F.linear(h, m.w).log_softmax(-1))[mask].mean()


@pytest.mark.filterwarnings("ignore:The .grad attribute", "ignore:.*should not be instantiated")  # of Dynamo's own
@pytest.mark.parametrize(
    ("loss", "fused"), [(masked_divergence, True), (masked_and_measured, None), (masked_mean, False)]
)
def test_the_sum_of_tokens_that_a_mask_picks_is_read_where_dynamo_captures_it(loss: Loss, fused: bool | None) -> None:
    """What the mask leaves out does not count, and is not finite here."""
    torch.manual_seed(0)
    model, h = Model(lambda m, h: h), torch.randn(N, D)
    run = Rewritten(loss, {"fusedhead.min_logits": 0})
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        for mask in (Y % 3 != 0, Y < 0, Y >= 0):
            for x in (h, torch.where(mask[:, None], h, torch.nan)):
                actual, wanted = run(model, x, mask), loss(model, x, mask)
                torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-6, equal_nan=True)
                torch.testing.assert_close(
                    gradients(model, actual), gradients(model, wanted), rtol=1e-4, atol=1e-6, equal_nan=True
                )
    assert not run.report.errors
    if fused is not None:
        assert all(head.fused is fused for head in run.report.heads)
