"""Writes to part of the logits in the graph: functions that the rules read, with the numbers of eager code."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.eager_stack import Rewritten
from tests.rules.diffusion import B, D, Model, T, gradients
from tests.rules.partial_writes import (
    FUSED,
    OTHERS,
)


@pytest.mark.parametrize("after", FUSED + OTHERS)
def test_in_the_graph(after: Callable[[Tensor], Tensor]) -> None:
    model, x = Model(after), torch.randn(B, T, D)
    run = Rewritten(model)
    torch.testing.assert_close(gradients(model, run(x)), gradients(model, model(x)), rtol=1e-4, atol=1e-6)
    if after in FUSED:
        assert [(head.fused, head.reason) for head in run.report.heads] == [(True, "")]
