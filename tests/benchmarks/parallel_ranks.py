"""What each rank runs in `test_parallel_benchmark` and `test_several_gpus`."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import data, distributed_steps, measure, parallel
from benchmarks.parallel_heads import of_tensor_parallel, shard_of
from benchmarks.shapes import parse

SMOKE = ["--smoke", "--device", "cpu", "--seconds", "0.05"]


def smoke() -> dict[str, Any]:
    """The rows as this rank has them, and the files that rank 0 writes."""
    measure.TURN_SECONDS = 0.001  # in this process: one step a turn
    with tempfile.TemporaryDirectory() as folder:
        rows = parallel.main([*SMOKE, "--out", folder])
        files = {file.name: file.read_text() for file in sorted(Path(folder).iterdir())}
    return {
        "rank": dist.get_rank(),
        "rows": [dataclasses.asdict(row) for row in rows],
        "files": files,
        "loss_parallel": {sequence: of_loss_parallel(sequence) for sequence in (False, True)},
    }


def of_loss_parallel(sequence: bool) -> list[tuple[str, list[int]]]:
    """The collectives of eager code under loss_parallel(): (name, shape of what this rank hands in)."""
    torch.compile = lambda model, **_: model  # in this process
    (case,), cpu = parse(parallel.SMOKE), torch.device("cpu")
    world = dist.group.WORLD
    assert world is not None
    shard = shard_of(case, data.random(case, cpu), world, dist.get_rank(), dist.get_world_size())
    step = of_tensor_parallel(shard, "eager", sequence)
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        step()
    names = {f"_c10d_functional::{name}" for name in ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor")}
    return [(each.name.split("::")[1], each.input_shapes[0]) for each in profile.events() if each.name in names]


def training_steps() -> dict[str, Any]:
    """An arrangement of `benchmarks.distributed_steps` without Inductor, and what is printed."""
    words = ["--tiny", "--device", "cpu", "--backends", "eager", "--only", "one unit, loss inside"]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()) as said:
        result = distributed_steps.main([*words, "--json", f"{folder}/steps.json"])
    return {**result, "said": said.getvalue()}
