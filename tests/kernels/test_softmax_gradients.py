"""A bfloat16 head of a model that has learnt: where the labels are likely, the products round least."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fusedhead.kernels.contract import Head, Needs, RowGrads, RowStats, Windows
from fusedhead.kernels.torch_engine import engine as torch_engine
from fusedhead.kernels.transform.transform import Transform

N, D, V = 192, 64, 6000
OPERANDS = Needs(True, True, False, False)


def learnt() -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states that point at their label: its logit is about 14, the others' are about normal."""
    torch.manual_seed(0)
    w, y = torch.randn(V, D), torch.randint(0, V, (N,))
    h = torch.randn(N, D) / D**0.5 + 14 * w[y] / w[y].square().sum(1, keepdim=True)
    return h.bfloat16(), w.bfloat16(), y


@pytest.mark.parametrize("at_once", [True, False])
def test_the_gradients_err_no_more_than_eager_code(any_cpu: None, at_once: bool) -> None:
    h, w, y = learnt()

    def eager(dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [x.to(dtype).requires_grad_() for x in (h, w)]
        z = leaves[0] @ leaves[1].t()
        loss = F.cross_entropy(z.float() if dtype == torch.bfloat16 else z, y)
        return tuple(g.double() for g in torch.autograd.grad(loss, leaves))

    none = torch.empty(0)
    head, windows = Head(h, w, y[:, None], none, none, none, Transform()), Windows(64, V, torch.bfloat16)
    c = RowGrads(torch.full((N,), 1 / N), torch.full((N, 1), -1 / N))
    if at_once:
        _, grads = torch_engine.head_loss(head, c, OPERANDS, windows)
    else:
        stats: RowStats = torch_engine.head_stats(head, frozenset({"lse", "picked"}), windows)
        grads = torch_engine.head_stats_backward(head, c, stats, OPERANDS, windows)
    for ours, theirs, truth in zip(grads, eager(torch.bfloat16), eager(torch.float64)):
        assert ours is not None
        assert (ours.double() - truth).norm() <= (theirs - truth).norm()
