"""Weights that a loop makes anew for every piece are one weight, unless they differ."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.eager_stack import Rewritten
from tests.programs.mixed_model import D, Model, N, V, Y, gradients, right


def chunked(weight: Callable[[Model, Tensor], Tensor], low: bool = False) -> Callable[[Model, Tensor], Tensor]:
    def loss(m: Model, h: Tensor) -> Tensor:
        total = torch.zeros(())
        for x, y in zip(h.chunk(4), Y.chunk(4)):
            z = F.linear(x.bfloat16() if low else x, weight(m, x))
            total = total + F.cross_entropy(z.float(), y, reduction="sum")
        return total / N

    return loss


def calls(run: Rewritten) -> int:
    return sum(line.count("= torch.ops.fusedhead.head_") for line in run.report.after.splitlines())


CHUNKS: dict[str, Callable[[Model, Tensor], Tensor]] = {
    "scaled anew": lambda m, x: m.w * 0.5,
    "cast twice anew": lambda m, x: m.w.double().float(),
    "normalised anew": lambda m, x: F.normalize(m.w, dim=-1),
    "transposed and copied anew": lambda m, x: m.w.t().contiguous().t(),
    "cast to its own dtype": lambda m, x: m.w.to(x.dtype),
}


@pytest.mark.parametrize("weight", CHUNKS)
def test_chunks_of_a_head_whose_weight_is_made_anew_are_one_sweep(weight: str) -> None:
    run = right(chunked(CHUNKS[weight]))
    assert all(head.fused for head in run.report.heads)
    assert calls(run) == 1


def test_chunks_of_a_head_whose_weight_is_cast_to_bfloat16_anew_are_one_sweep() -> None:
    model, x = Model(chunked(lambda m, x: m.w.bfloat16(), low=True)), torch.randn(N, D)
    run = Rewritten(model)
    torch.testing.assert_close(gradients(model, run(x)), gradients(model, model(x)), rtol=0.05, atol=2e-3)
    assert calls(run) == 1


def written_in_between(m: Model, h: Tensor) -> Tensor:
    scale = torch.ones(V, 1)
    first = F.cross_entropy(F.linear(h, m.w + scale), Y)
    scale[3:].mul_(2)
    return first + F.cross_entropy(F.linear(h, m.w + scale), Y)


def without_gradients_once(m: Model, h: Tensor) -> Tensor:
    with torch.no_grad():
        fixed = m.w * 0.5
    return F.cross_entropy(F.linear(h, fixed), Y) + F.cross_entropy(F.linear(h, m.w * 0.5), Y)


def dropped_twice(m: Model, h: Tensor) -> Tensor:
    return sum(F.cross_entropy(F.linear(h, F.dropout(m.w, 0.2)), Y) for _ in range(2))


@pytest.mark.parametrize("of", [written_in_between, without_gradients_once])
def test_weights_that_only_look_alike_stay_apart(of: Callable[[Model, Tensor], Tensor]) -> None:
    right(of)


def test_weights_that_are_drawn_stay_apart() -> None:
    model, x = Model(dropped_twice), torch.randn(N, D)
    run = Rewritten(model)
    torch.manual_seed(3)
    wanted = gradients(model, model(x))
    torch.manual_seed(3)
    torch.testing.assert_close(gradients(model, run(x)), wanted, rtol=1e-4, atol=1e-5)
