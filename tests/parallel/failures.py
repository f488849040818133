"""Heads of DTensors whose ranks fail or do not fit together: what each rank does in `test_failures_of_dtensors`."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, loss_parallel, parallelize_module

from tests.functional.failures import die_on, what_happens
from tests.parallel.arrangements import program, tp_mesh
from tests.parallel.models import Setting, compiled


def step() -> tuple[Any, list[Any]]:
    """A forward of a compiled model under loss_parallel, and the report."""
    of, setting, records = program(97), Setting(), list[Any]()
    model = of.made(setting)
    style = ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
    parallelize_module(model, tp_mesh(setting), {"head": style})
    run, batch = compiled(model, setting, records), of.batch(setting)

    def forward() -> Tensor:
        with loss_parallel():
            return run(*batch)  # type: ignore[no-any-return]

    return forward, records


def in_the_forward() -> Any:
    forward, records = step()
    return *what_happens(forward, "forward"), [head.fused for head in records]


def in_the_backward() -> Any:
    forward, records = step()
    return *what_happens(forward, "backward"), [head.fused for head in records]


def before_it_compiles() -> Any:
    forward, records = step()
    die_on(1)
    started = time.monotonic()
    try:
        forward().backward()
    except Exception as error:
        return f"{type(error).__name__}: {error}", time.monotonic() - started, [head.fused for head in records]
    return "no error", 0.0, []


def other_hidden_size() -> dict[str, tuple[str, float]]:
    return misfit("hidden size", 16 + 8 * dist.get_rank(), 48)


def smaller_group() -> dict[str, tuple[str, float]]:
    return misfit("a group of half as many ranks", 16, 24)


def misfit(name: str, depth: int, classes: int) -> dict[str, tuple[str, float]]:
    """What each rank reads of a head whose shards do not fit together."""
    mesh = DeviceMesh.from_group(dist.new_group([0, 1], timeout=timedelta(seconds=20)), "cpu")
    make = torch.Generator().manual_seed(3)
    h = torch.randn(24, depth, generator=make).requires_grad_()
    w = torch.randn(classes, depth, generator=make).requires_grad_()
    y = torch.arange(24) * 4  # up to 92, of 96 classes

    def loss(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        hidden = DTensor.from_local(h, mesh, [Replicate()], run_check=False)
        z = hidden @ DTensor.from_local(w, mesh, [Shard(0)], run_check=False).t()
        return F.cross_entropy(z.redistribute(mesh, [Replicate()]).to_local(), y)

    started = time.monotonic()
    try:
        compiled(loss, Setting(), [])(h, w, y).backward()
    except Exception as error:
        return {name: (f"{type(error).__name__}: {error}", time.monotonic() - started)}
    return {name: ("no error", 0.0)}
