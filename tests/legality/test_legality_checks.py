"""Checks of a site: a write that autograd does not see, to what it saved, keeps a head in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.mutations.unseen import D, N, V, labels
from tests.programs.claims import left

UNSEEN_BY_AUTOGRAD: dict[str, Callable[[Tensor], Any]] = {
    "in place": lambda x: x.data.clamp_(max=1),
    "copy_": lambda x: x.data.copy_(x.data * 2),
    "setitem": lambda x: x.data.__setitem__(0, 0.5),
    "out": lambda x: torch.mul(x.data, 2, out=x.data),
}
SAVED: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]] = {  # logits and labels -> a value, a loss
    "log_softmax": lambda z, y: ((x := z.log_softmax(1)), F.nll_loss(x, y)),
    "logits": lambda z, y: (z, z.logsumexp(1).sum()),
    "capped logits": lambda z, y: ((x := torch.tanh(z)), F.cross_entropy(x * 3, y)),
    "maximum": lambda z, y: (z.amax(1), F.cross_entropy(z, y)),
    "lse": lambda z, y: (z.logsumexp(1), None),
    "checkpointed lse": lambda z, y: (z.logsumexp(1), None),
}


@pytest.mark.parametrize("spelling", UNSEEN_BY_AUTOGRAD)
@pytest.mark.parametrize("saved", SAVED)
def test_a_backward_reads_what_was_changed_through_data_as_in_eager_code(saved: str, spelling: str) -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        value, loss = SAVED[saved](F.linear(h, w), y)
        UNSEEN_BY_AUTOGRAD[spelling](value)
        return value.square().sum() if loss is None else loss + value.sum()

    def checkpointed(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return checkpoint(program, h, w, y, use_reentrant=False)

    h, w = torch.randn(N, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    left(checkpointed if "checkpointed" in saved else program, h, w, labels(), because="")
