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
    made = of.made(setting)
    style = ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
    parallelize_module(made, tp_mesh(setting), {"head": style})
    run, batch = compiled(made, setting, records), of.batch(setting)

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


def misfits() -> dict[str, tuple[str, float]]:
    """What each rank reads of heads whose shards do not fit together, each in a process group of its own."""
    rank = dist.get_rank()
    found: dict[str, tuple[str, float]] = {}
    for name, depth, classes in (("hidden size", 16 + 8 * rank, 48), ("a group of half as many ranks", 16, 24)):
        mesh = DeviceMesh.from_group(dist.new_group([0, 1], timeout=timedelta(seconds=20)), "cpu")
        make = torch.Generator().manual_seed(3)
        h = torch.randn(24, depth, generator=make).requires_grad_()
        w = torch.randn(classes, depth, generator=make).requires_grad_()
        y = torch.arange(24) * 4  # up to 92, of 96 classes

        def loss(h: Tensor, w: Tensor, y: Tensor, mesh: Any = mesh) -> Tensor:
            hidden = DTensor.from_local(h, mesh, [Replicate()], run_check=False)
            z = hidden @ DTensor.from_local(w, mesh, [Shard(0)], run_check=False).t()
            return F.cross_entropy(z.redistribute(mesh, [Replicate()]).to_local(), y)

        started = time.monotonic()
        try:
            compiled(loss, Setting(), [])(h, w, y).backward()
            found[name] = ("no error", 0.0)
        except Exception as error:
            found[name] = (f"{type(error).__name__}: {error}", time.monotonic() - started)
    return found
