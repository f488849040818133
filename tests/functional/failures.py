"""What each rank does where another one fails in the middle of a head in shards: it reads an error, and when."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor

import fusedhead
from fusedhead.functional.vocab_parallel import bounds
from tests.functional.test_linear_cross_entropy import given

V = 96


def die_on(rank: int) -> None:
    if dist.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)


def what_happens(forward: Callable[[], Tensor], when: str) -> tuple[str, float]:
    """(what is raised, after how many seconds) where rank 1 dies ``when``: before the second forward, or backward."""
    forward().backward()
    started = time.monotonic()
    try:
        if when == "forward":
            die_on(1)
        loss = forward()
        if when == "backward":
            die_on(1)
        loss.backward()
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}", time.monotonic() - started
    return "no error", time.monotonic() - started


def function(**size: Any) -> Callable[[], Tensor]:
    operands = given(3)
    first, last = bounds(V, dist.get_world_size(), dist.get_rank())
    h, w = operands["input"], operands["linear_weight"].detach()[first:last].requires_grad_()
    return lambda: fusedhead.linear_cross_entropy(h, w, operands["target"], group=dist.group.WORLD, **size)


def in_the_forward() -> tuple[str, float]:
    return what_happens(function(), "forward")


def in_one_sweep() -> tuple[str, float]:
    return what_happens(function(vocab_size=V), "forward")


def in_the_backward() -> tuple[str, float]:
    return what_happens(function(), "backward")
