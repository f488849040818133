"""Deferred logits read inside of checkpoints, hooks, stand-ins and function transforms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from tests.deferred.heads import Model, Operations, T, deferring, tokens
from tests.deferred.losses import LOSSES, ROWS, same

REGIONS: dict[str, Callable[[Tensor], Any]] = {
    **LOSSES,
    "two statistics": lambda z: z.logsumexp(-1).mean() + LOSSES["entropy"](z),
    "a statistic and the numbers": lambda z: z.logsumexp(-1).mean() + z.sin().mean(),
    "steps that save what they make": lambda z: (z.exp() + z.tanh() * z.sigmoid()).mean(),
    "chunks": lambda z: sum(c.logsumexp(-1).mean() for c in z.chunk(3, 1)),
    "chunks and the whole": lambda z: sum(c.logsumexp(-1).mean() for c in z.chunk(3, 1)) + z.logsumexp(-1).mean(),
}


def save_products(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    products = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.sin.default)
    return CheckpointPolicy.MUST_SAVE if op in products else CheckpointPolicy.PREFER_RECOMPUTE


SURROUNDINGS: dict[str, Callable[[Any, Any], Any]] = {
    "checkpoint": lambda f, *a: checkpoint(f, *a, use_reentrant=False),
    "reentrant checkpoint": lambda f, *a: checkpoint(f, *a, use_reentrant=True),
    "selective checkpoint": lambda f, *a: checkpoint(
        f, *a, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(save_products)
    ),
    "checkpoint in a checkpoint": lambda f, *a: checkpoint(
        lambda *b: checkpoint(f, *b, use_reentrant=False), *a, use_reentrant=False
    ),
}


@pytest.mark.parametrize("surrounding", SURROUNDINGS)
@pytest.mark.parametrize("region", REGIONS)
def test_logits_first_read_in_a_region_that_is_run_twice(surrounding: str, region: str) -> None:
    def run(forward: Any, model: Model) -> Tensor:
        z = forward()
        value = SURROUNDINGS[surrounding](REGIONS[region], z)
        return value + z.pow(2).mean()  # numbers that exist by the second run

    same(run)


def test_a_model_and_its_loss_in_one_region_stay_fused() -> None:
    model, x = Model(), tokens(ROWS)
    compiled, ran = deferring(model), []

    def region(t: Tensor) -> Tensor:
        z = compiled(t)
        with Operations(ROWS * T) as these:
            ran.append(these)
            return LOSSES["cross_entropy"](z)

    checkpoint(region, x, use_reentrant=False).backward()
    results = [p.grad for p in model.parameters()]
    model.zero_grad()
    LOSSES["cross_entropy"](model(x)).backward()
    torch.testing.assert_close(results, [p.grad for p in model.parameters()], rtol=1e-4, atol=1e-6)
    assert [(these.fused, these.large) for these in ran] == [(["head_loss"], [])] * 2


@pytest.mark.parametrize("loss", LOSSES)
def test_hooks_on_saved_tensors_get_what_is_saved_and_give_it_back(loss: str) -> None:
    def run(forward: Any, model: Model) -> Tensor:
        z = forward()
        with torch.autograd.graph.save_on_cpu():
            value = LOSSES[loss](z)
        return value + z.cos().mean()

    same(run)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_read_among_stand_ins_leaves_none_behind(loss: str) -> None:
    def run(forward: Any, model: Model) -> Tensor:
        z = forward()
        with FakeTensorMode(allow_non_fake_inputs=True):
            assert isinstance(LOSSES[loss](z), FakeTensor)
            assert isinstance(z.sin(), FakeTensor)
        return LOSSES[loss](z) + z.sin().mean()

    same(run)


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]] = {
    "grad": lambda f, z: torch.func.grad(f)(z).pow(2).sum(),
    "grad of a factor": lambda f, z: torch.func.grad(lambda s: f(z * s))(torch.ones(())),
    "vmap": lambda f, z: torch.func.vmap(lambda s: z.logsumexp(-1) * s)(torch.ones(3)).sum() + f(z),
    "vmap over it": lambda f, z: torch.func.vmap(lambda row: row.logsumexp(-1))(z).sum(),
    "jvp": lambda f, z: torch.func.jvp(f, (z,), (torch.ones_like(z),))[1],
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("loss", LOSSES)
def test_function_transforms_see_numbers_and_leave_none_of_theirs_behind(transform: str, loss: str) -> None:
    def run(forward: Any, model: Model) -> Tensor:
        z = forward()
        return TRANSFORMS[transform](LOSSES[loss], z) + LOSSES[loss](z) + z.sin().mean()

    same(run)
