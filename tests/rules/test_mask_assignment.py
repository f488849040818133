"""A number written where a mask picks tokens, or tokens and classes: read where Dynamo traces masks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.eager_stack import Rewritten
from tests.rules.diffusion import MASK_CLASS, X0, XT, B, D, Model, T, V, gradients


@pytest.mark.parametrize("number", [0.0, -float("inf")])
@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_one_class_of_some_tokens_is_set_where_dynamo_traces_masks(number: float) -> None:
    def after(z: Tensor) -> Tensor:
        unmasked = XT != MASK_CLASS
        z[unmasked, XT[unmasked]] = number
        return F.cross_entropy(z.flatten(0, 1), (X0.flatten() + 1) % V)

    model, x = Model(after), torch.randn(B, T, D)
    run = Rewritten(model)
    torch.testing.assert_close(gradients(model, run(x)), gradients(model, model(x)), rtol=1e-4, atol=1e-6)
    assert [head.fused for head in run.report.heads] == [True]
