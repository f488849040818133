"""Rows that only the data pick: boolean masks and their indices, on the logits or before the head."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.capabilities import masks_counted_apart
from tests.programs.claims import B, T, V, hidden, labels, left, not_fused, right, weight

# Dynamo looks at .grad of what crosses a graph break
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")

PICKED = {
    "a mask on the hidden states": lambda h, w, y, m: F.cross_entropy(F.linear(h[m], w), y[m]),
    "a mask": lambda h, w, y, m: F.cross_entropy(F.linear(h, w)[m], y[m]),
    "a mask of flat tokens": lambda h, w, y, m: F.cross_entropy(
        F.linear(h, w).view(-1, V)[m.view(-1)], y.view(-1)[m.view(-1)], reduction="sum"
    ) / m.sum(),
    "a mask after the shift": lambda h, w, y, m: F.cross_entropy(
        F.linear(h, w)[..., :-1, :][m[..., 1:]].float().contiguous(), y[..., 1:][m[..., 1:]]
    ),
    "a mask, per token": lambda h, w, y, m: F.linear(h, w)[m].log_softmax(-1).gather(1, y[m][:, None]).exp().mean(),
    "a mask, soft targets": lambda h, w, y, m: -(F.linear(h, w)[m].log_softmax(-1) * torch.arange(V)).sum(-1).mean(),
    "a mask, divergence": lambda h, w, y, m: F.kl_div(
        F.linear(h, w)[m].log_softmax(-1), (F.linear(h, w) * 0.3).detach()[m].softmax(-1), reduction="batchmean"
    ),
    "nonzero": lambda h, w, y, m: F.cross_entropy(
        F.linear(h, w).view(-1, V).index_select(0, m.view(-1).nonzero()[:, 0]),
        y.view(-1).index_select(0, m.view(-1).nonzero()[:, 0]),
    ),
    "nonzero of two dimensions": lambda h, w, y, m: F.cross_entropy(
        F.linear(h, w)[m.nonzero(as_tuple=True)], y[m.nonzero(as_tuple=True)]
    ),
}  # fmt: skip
# The mask is applied twice, and the loss needs to know that both give as many rows: an older Dynamo cannot say so, and
# breaks the graph before the loss.
COUNTED_TWICE = {"a mask of flat tokens", "a mask after the shift", "nonzero"}


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("spelling", PICKED)
def test_rows_that_the_data_pick_are_fused(spelling: str, dynamic: bool | None) -> None:
    w = weight()

    def program(h: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        return PICKED[spelling](h, w, y, mask)

    fused = 2 if spelling == "a mask, divergence" else 1
    inputs = hidden(), labels(), torch.rand(B, T) > 0.3
    apart = spelling in COUNTED_TWICE and not masks_counted_apart()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        if apart:
            not_fused(program, *inputs, dynamic=dynamic)
        else:
            right(program, *inputs, fused=fused, dynamic=dynamic)


def test_picked_entries_of_flattened_logits_are_left_alone() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(h, w).masked_select(mask.unsqueeze(-1)).view(-1, V), y.masked_select(mask))

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        if masks_counted_apart():
            left(program, hidden(), weight(), labels(), torch.rand(B, T) > 0.3, because="masked_select")
        else:
            not_fused(program, hidden(), weight(), labels(), torch.rand(B, T) > 0.3)
