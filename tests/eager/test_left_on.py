"""What a training step with a deferred head leaves behind: no mode on in the optimizer, no object that lives on."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

import fusedhead
from fusedhead.compat import dispatch_modes, function_modes
from fusedhead.deferred.state import DeferredState
from fusedhead.deferred.tensor import DeferredLogits
from tests.eager.models import Model, batch
from tests.eager.tied import Tied


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        x, y = batch()
        logits = model(x)
        assert type(logits) is DeferredLogits
        F.cross_entropy(logits.flatten(0, 1), y.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("make", [Model, Tied])
def test_no_mode_is_on_in_the_optimizer_and_in_the_backward_pass(make: Callable[[], nn.Module]) -> None:
    model, seen = make(), []
    fusedhead.defer(model)

    def note(*_: Any) -> None:
        seen.append((*function_modes(), *dispatch_modes()))

    next(model.parameters()).register_post_accumulate_grad_hook(note)
    handle = register_optimizer_step_pre_hook(note)
    try:
        train(model, torch.optim.AdamW(model.parameters()), 2)
    finally:
        handle.remove()
    assert seen == [()] * 4


def deferred_objects() -> list[Any]:
    return [x for x in gc.get_objects() if type(x) in (DeferredLogits, DeferredState)]


@pytest.mark.parametrize("make", [Model, Tied])
def test_nothing_of_a_step_waits_for_the_garbage_collector(make: Callable[[], nn.Module]) -> None:
    model = make()
    fusedhead.defer(model)
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, 2)
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        before = deferred_objects()  # of other tests: held, so that no id is given twice
        known = set(map(id, before))
        train(model, optimizer, 4)
        left = [x for x in deferred_objects() if id(x) not in known]
        tensors = sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects())
        train(model, optimizer, 4)
        assert left == []
        assert sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects()) == tensors
    finally:
        if enabled:
            gc.enable()
