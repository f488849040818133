"""Arrangements of a tensor-parallel head, as programs write them; what each rank does in the tests of this folder.

Every program trains the same small model for two steps and is compared with one process: `reference`.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)

from tests.parallel.models import Model, Setting, data, everything, smoothed, total, train

V = 96


class Program(NamedTuple):
    """What is trained, on ranks as on one process."""

    vocab: int = V
    ignored: float = 0.0
    below: int | None = None  # labels are of the first classes
    micro: int = 1
    rows: int = 1  # times the setting's
    dtype: torch.dtype | None = None  # the setting's
    model: tuple[tuple[str, Any], ...] = ()

    def made(self, setting: Setting, kind: type[Model] = Model) -> Model:
        model = kind(setting.depth, self.vocab * setting.scale, seed=setting.seed, **dict(self.model))
        return model.to(device=setting.device, dtype=self.dtype or setting.dtype)

    def batch(self, setting: Setting) -> tuple[Tensor, Tensor]:
        below = self.below * setting.scale if self.below else None
        setting = setting._replace(batch=setting.batch * self.rows)
        return data(setting, self.vocab * setting.scale, self.ignored, below)


def program(vocab: int = V, **how: Any) -> Program:
    """A program of so many classes; ``how``: fields of `Program`, and arguments of the model."""
    fields = {name: how.pop(name) for name in ("ignored", "below", "micro", "rows") if name in how}
    return Program(vocab, **fields, model=tuple(how.items()))


def reference(setting: Setting, of: Program, dtype: torch.dtype, inductor: bool = False) -> dict[str, Any]:
    """The same by one process in eager mode, or through Inductor alone."""
    setting, threads = setting._replace(dtype=dtype), torch.get_num_threads()
    model = of._replace(dtype=dtype).made(setting)
    if inductor:
        torch._dynamo.reset()
        model.compile(backend="inductor")
    torch.set_num_threads(1)  # as each rank has: with more, sums over tokens are shorter
    try:
        return train(model, setting, of.batch(setting), eager=True, micro=of.micro)
    finally:
        torch.set_num_threads(threads)


def tp_mesh(setting: Setting) -> Any:
    return init_device_mesh(setting.device, (dist.get_world_size(),), mesh_dim_names=("tp",))


def colwise(
    setting: Setting, of: Program, output: Any = None, local: bool = False, parallel: bool = True, **options: Any
) -> dict[str, Any]:
    """ColwiseParallel, its logits in shards or gathered, as DTensors or local, the loss under loss_parallel or not."""
    model, mesh = of.made(setting), tp_mesh(setting)
    style = ColwiseParallel(output_layouts=output or Shard(-1), use_local_output=local)
    parallelize_module(model, mesh, {"head": style} | ({"second": style} if model.second is not None else {}))
    x, y = of.batch(setting)
    if not local and not parallel:  # DTensors meet DTensors alone
        y = DTensor.from_local(y, mesh, [Replicate()], run_check=False)
    return train(model, setting, (x, y), loss_parallel if parallel else nullcontext, micro=of.micro, **options)


def sequence_parallel(setting: Setting, of: Program) -> dict[str, Any]:
    model = of.made(setting)
    plan = {
        "embed": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "norm": SequenceParallel(),
        "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Shard(-1), use_local_output=False),
    }
    parallelize_module(model, tp_mesh(setting), plan)
    return train(model, setting, of.batch(setting), loss_parallel)


class ByHand(Model):
    """A weight that the program itself has distributed."""

    def place(self, mesh: Any, placement: Any, end: str) -> None:
        self.mesh, self.end = mesh, end
        self.head.weight = nn.Parameter(distribute_tensor(self.head.weight.detach(), mesh, [placement]))

    def of_hidden(self, h: Tensor, y: Tensor) -> Tensor:
        z = DTensor.from_local(h, self.mesh, [Replicate()]) @ self.head.weight.t()
        z = z.full_tensor() if self.end == "full_tensor" else z.redistribute(self.mesh, [Replicate()]).to_local()
        return self.loss(z.flatten(0, 1), y.flatten())


def by_hand(setting: Setting, of: Program, placement: Any, end: str = "to_local") -> dict[str, Any]:
    model = of.made(setting, ByHand)
    model.place(tp_mesh(setting), placement, end)  # type: ignore[attr-defined]
    return train(model, setting, of.batch(setting))


def fsdp(setting: Setting, of: Program, shards: int) -> dict[str, Any]:
    """FSDP2 over one dimension of a mesh, tensor parallelism over ``shards`` ranks (0: all); all data on every rank."""
    from torch.distributed.fsdp import fully_shard

    ranks = dist.get_world_size()
    mesh = init_device_mesh(setting.device, (ranks // (shards or ranks), shards or ranks), mesh_dim_names=("dp", "tp"))
    model = of.made(setting)
    parallelize_module(model, mesh["tp"], {"head": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)})
    fully_shard(model, mesh=mesh["dp"])
    return train(model, setting, of.batch(setting), loss_parallel)


class Arrangement(NamedTuple):
    """What the ranks run, what is trained, the collectives of the last step, and how the sentence begins if it is left.

    None: those of the program itself, which are not looked at. ``again``: why the gradients take a second sweep.
    """

    run: Callable[..., dict[str, Any]]
    of: Program
    forward: dict[str, int] | None
    backward: dict[str, int] | None
    left: str = ""
    again: str = ""


ONE, TWO = {"_allgather_base_": 1}, {"_allgather_base_": 2}
SUM = {"allreduce_": 1}
REGION = "inside a checkpointed region"
LOCAL = {"output": Replicate(), "local": True, "parallel": False}
gathered = partial(colwise, **LOCAL)
ARRANGEMENTS: dict[str, Arrangement] = {
    "colwise, loss_parallel": Arrangement(colwise, program(), ONE, SUM),
    "bias": Arrangement(colwise, program(bias=True), ONE, SUM),
    "ignore_index": Arrangement(colwise, program(ignored=0.3), ONE, SUM),
    "V not divisible": Arrangement(colwise, program(97), ONE, SUM),
    "an empty shard": Arrangement(colwise, program(9), ONE, SUM),  # of four ranks
    "labels all elsewhere": Arrangement(colwise, program(below=20), ONE, SUM),
    "sum": Arrangement(colwise, program(loss=total), ONE, SUM),
    "gradient accumulation": Arrangement(colwise, program(micro=2), ONE, SUM),
    # the region is computed again, its sweep too: the backward reads its lse
    "activation checkpointing": Arrangement(colwise, program(checkpointed=True), ONE, ONE | SUM, again=REGION),
    "gathered, local, checkpointed": Arrangement(gathered, program(checkpointed=True), TWO, TWO | SUM, again=REGION),
    # each window of 192 of the 640 tokens is gathered before its products
    "several windows": Arrangement(colwise, program(97, rows=20, ignored=0.2), {"_allgather_base_": 4}, SUM),
    "several windows, gathered": Arrangement(
        gathered, program(97, rows=20, loss=smoothed), {"_allgather_base_": 5}, SUM
    ),
    # a block of 512 columns is all of the last of two shards, and not of the first
    "least memory, V not divisible": Arrangement(partial(colwise, memory="min"), program(1025), ONE, SUM),
    "two heads, V not divisible": Arrangement(
        colwise, program(97, second=35), {"_allgather_base_": 2}, {"allreduce_": 2}
    ),
    "gathered, a DTensor": Arrangement(partial(colwise, output=Replicate(), parallel=False), program(), ONE, SUM),
    "gathered, local": Arrangement(gathered, program(), TWO, SUM),
    "gathered, bias, V not divisible": Arrangement(gathered, program(97, bias=True), TWO, SUM),
    "label smoothing, a temperature": Arrangement(gathered, program(loss=smoothed), TWO, SUM),
    "every statistic": Arrangement(gathered, program(loss=everything), TWO, SUM, again="argmax, entropy is asked for"),
    "sequence parallel": Arrangement(
        sequence_parallel,
        program(blocks=False),
        # the embedding's own scatter forward and gather backward, and those of the hidden states
        {"_allgather_base_": 2, "reduce_scatter_tensor_coalesced_": 1, "allgather_into_tensor_coalesced_": 1},
        {"_reduce_scatter_base_": 1, "allgather_into_tensor_coalesced_": 1},
    ),
    "by hand, Shard(0), to_local": Arrangement(partial(by_hand, placement=Shard(0)), program(), TWO, SUM),
    "by hand, Shard(0), full_tensor": Arrangement(
        partial(by_hand, placement=Shard(0), end="full_tensor"), program(), TWO, SUM
    ),
    "by hand, Replicate": Arrangement(partial(by_hand, placement=Replicate()), program(), {}, {}),
    "by hand, Shard(1)": Arrangement(
        partial(by_hand, placement=Shard(1)), program(), None, None, "its weight [96, 16] is placed as Shard(1) on the"
    ),
    "FSDP2 x TP, all ranks": Arrangement(partial(fsdp, shards=0), program(), ONE, SUM),
    "FSDP2 x TP, half of the ranks": Arrangement(partial(fsdp, shards=2), program(), None, None),
    "FSDP2 x TP, one rank": Arrangement(partial(fsdp, shards=1), program(), None, None),
}
SAMPLE = (  # of `make test`
    "V not divisible", "labels all elsewhere", "gathered, bias, V not divisible", "sequence parallel",
    "two heads, V not divisible", "gathered, local, checkpointed",
)  # fmt: skip
THROUGH_INDUCTOR = (
    "V not divisible", "two heads, V not divisible", "gathered, local", "sequence parallel", "every statistic",
    "activation checkpointing", "FSDP2 x TP, half of the ranks",
)  # fmt: skip


def outcomes(names: Any, setting: Setting) -> dict[str, Any]:
    """Run on each rank. What raises is returned as text."""
    results: dict[str, Any] = {}
    for name in names:
        try:
            results[name] = ARRANGEMENTS[name].run(setting, ARRANGEMENTS[name].of)
        except Exception as error:
            results[name] = f"{type(error).__name__}: {error}\n{traceback.format_exc()[-3000:]}"
    return results


def every_arrangement() -> dict[str, Any]:
    return outcomes(ARRANGEMENTS, Setting())


def sample() -> dict[str, Any]:
    return outcomes(SAMPLE, Setting())


def named() -> dict[str, Any]:
    """Those that a developer asks for by the variable NAMES, separated by bars."""
    return outcomes(os.environ["NAMES"].split("|"), Setting(inductor="INDUCTOR" in os.environ))


BF16 = [Setting(dtype=torch.bfloat16, count=False, seed=seed) for seed in range(10)]
IN_TWO_BYTES = ("colwise, loss_parallel", "gathered, bias, V not divisible", "sequence parallel")


def in_two_bytes() -> dict[str, Any]:
    """Of each arrangement what it gives for several seeds."""
    results = [outcomes(IN_TWO_BYTES, setting) for setting in BF16]
    return {name: [each[name] for each in results] for name in IN_TWO_BYTES}


def through_inductor() -> dict[str, Any]:
    return outcomes(THROUGH_INDUCTOR, Setting(inductor=True))
