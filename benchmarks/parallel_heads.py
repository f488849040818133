"""The contenders of `benchmarks.parallel`: ways to compute a head whose classes lie in shards.

Each makes a step: a function of nothing that returns the loss, dH and dW of this rank's rows, as `tasks.step_of` does.
To add one, add a function and a line. Nothing here measures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import fusedhead
from benchmarks import tasks
from benchmarks.data import IGNORED, Batch
from benchmarks.measure import Step
from benchmarks.ranks import Call, replaced
from benchmarks.shapes import Case
from fusedhead.functional.vocab_parallel import bounds

FUSED = {"fusedhead.shards": True, "fusedhead.strict": True, "fusedhead.min_logits": 0}
LARGE = 1 << 20  # elements: dH, and no statistics


class Shard(NamedTuple):
    """One rank's part of a head."""

    case: Case
    ranks: int
    rank: int
    group: dist.ProcessGroup
    h: Tensor  # [N, D]
    w: Tensor  # [V/w, D]
    y: Tensor  # [N] of all classes
    whole: Tensor  # [V, D]

    @property
    def local_labels(self) -> Tensor:
        """[N] of this rank's classes, as many as are counted."""
        return torch.where(self.y == IGNORED, IGNORED, self.y % self.w.shape[0])


def shard_of(case: Case, batch: Batch, group: dist.ProcessGroup, rank: int, ranks: int) -> Shard:
    first, last = bounds(case.vocab, ranks, rank)
    return Shard(case, ranks, rank, group, batch.h, batch.w[first:last].clone(), batch.y, batch.w)


Make = Callable[[Shard], Step]


class Contender(NamedTuple):
    make: Make
    arrangement: str | None  # of `arrangements.ARRANGEMENTS`; None where nothing is sent
    about: str
    compiled: bool = False
    unsent: bool = False  # whether it runs where nothing is sent, on one of so many ranks
    apart: bool = False  # whether it is timed without its wire too, and its wire alone


def of_function(s: Shard, y: Tensor, **how: Any) -> Step:
    h, w = s.h.detach().requires_grad_(), s.w.detach().requires_grad_()

    def step() -> tuple[Tensor, ...]:
        loss = fusedhead.linear_cross_entropy(h, w, y, **how)
        return loss.detach(), *torch.autograd.grad(loss, (h, w))

    return step


def bare_products(s: Shard) -> Step:
    return tasks.floor_step(tasks.TASKS["train"], Batch(s.h, s.w, s.y, s.y))


def one_gpu(s: Shard) -> Step:
    return of_function(s, s.local_labels)


def one_gpu_in_two_sweeps(s: Shard) -> Step:
    h, w, y = s.h.detach().requires_grad_(), s.w.detach().requires_grad_(), s.local_labels
    weights = (y != IGNORED).float() / (y != IGNORED).sum()

    def step() -> tuple[Tensor, ...]:
        each = fusedhead.linear_cross_entropy(h, w, y, reduction="none")
        loss = each.float() @ weights
        return loss.detach(), *torch.autograd.grad(loss, (h, w))

    return step


def by_group(s: Shard) -> Step:
    return of_function(s, s.y, group=s.group)


def by_group_narrow(s: Shard) -> Step:
    return of_function(s, s.y, group=s.group, reduce_dtype=None)


def by_even_shards(s: Shard) -> Step:
    return of_function(s, s.y, group=s.group, vocab_size=s.case.vocab)


@contextmanager
def large_reductions_in_the_background(works: list[Any]) -> Iterator[None]:
    """An all_reduce of a large tensor does not wait: whoever waits for ``works`` does."""

    def started(name: str, real: Call) -> Call:
        def call(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            if x.numel() < LARGE or name != "all_reduce":
                return real(x, *args, **kwargs)
            return works.append(real(x, *args, async_op=True, **kwargs))

        return call

    with replaced(started):
        yield


def halves(s: Shard, overlap: bool) -> Step:
    """The tokens in two halves, so that the sum of the first one's dH can run beside the second's products.

    In its own dtype, in which the tensor that is summed is the one that is returned: nothing reads it before.
    """
    w = s.w.detach().requires_grad_()
    parts = [x.detach().requires_grad_() for x in s.h.chunk(2)]
    labels = s.y.chunk(2)
    counted = (s.y != IGNORED).sum()

    def step() -> tuple[Tensor, ...]:
        total, dw, dh, works = s.h.new_zeros((), dtype=torch.float32), None, [], []
        with large_reductions_in_the_background(works) if overlap else nullcontext():
            for h, y in zip(parts, labels):
                loss = (
                    fusedhead.linear_cross_entropy(h, w, y, reduction="sum", group=s.group, reduce_dtype=None) / counted
                )
                mine, of_w = torch.autograd.grad(loss, (h, w))
                total, dw = total + loss.detach(), of_w if dw is None else dw.add_(of_w)
                dh.append(mine)
        for work in works:
            work.wait()
        return total, torch.cat(dh), dw

    return step


class Head(nn.Module):
    """A projection and its loss, as training code writes them."""

    def __init__(self, whole: Tensor) -> None:
        super().__init__()
        with torch.device("meta"):
            self.project = nn.Linear(whole.shape[1], whole.shape[0], bias=False)
        self.project.weight = nn.Parameter(whole)

    def forward(self, h: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.project(h).float(), y)


def of_tensor_parallel(s: Shard, backend: str, sequence: bool = False, gather: bool = False) -> Step:
    """A ColwiseParallel head under ``loss_parallel()``, compiled; ``sequence``: tokens of h lie in shards.

    ``gather``: its output is Replicate and local, so that the program is the one of a device, and gathers [N, V] logits
    where nothing is fused.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor import Shard as Sharded
    from torch.distributed.tensor.parallel import ColwiseParallel, loss_parallel, parallelize_module

    model = Head(s.whole)
    style = ColwiseParallel(
        input_layouts=Sharded(0) if sequence else Replicate(),
        output_layouts=Replicate() if gather else Sharded(-1),
        use_local_output=gather,
    )
    mesh = init_device_mesh(s.h.device.type, (s.ranks,))
    parallelize_module(model, mesh, {"project": style}, src_data_rank=None)
    weight = model.project.weight
    h = (s.h.chunk(s.ranks)[s.rank] if sequence else s.h).detach().clone().requires_grad_()
    options = FUSED if backend == "fusedhead" else None
    compiled = torch.compile(model, backend=backend, options=options, dynamic=False)

    def local(x: Tensor) -> Tensor:
        return x.to_local() if hasattr(x, "to_local") else x  # type: ignore[no-any-return]

    def step() -> tuple[Tensor, ...]:
        with nullcontext() if gather else loss_parallel():
            loss = compiled(h, s.y)
            dh, dw = torch.autograd.grad(loss, (h, weight))
        return local(loss.detach()), local(dh), local(dw)

    return step


ONE = "one GPU's head"
CONTENDERS: dict[str, Contender] = {
    "bare products": Contender(bare_products, None, "the three products with V/w classes", unsent=True),
    ONE: Contender(one_gpu, None, "a head with V/w classes and no shards: what efficiency is relative to", unsent=True),
    "one GPU's head in two sweeps": Contender(
        one_gpu_in_two_sweeps, None, "the same where the gradient takes a sweep of its own: four products", unsent=True
    ),
    "group=": Contender(
        by_group, "group=", "linear_cross_entropy(..., group=), dH summed in float32", unsent=True, apart=True
    ),
    "group=, vocab_size": Contender(
        by_even_shards, "group=, vocab_size", "the same with vocab_size=V: three products", unsent=True, apart=True
    ),
    "group=, dH in its dtype": Contender(
        by_group_narrow, "group=, dH in its dtype", "the same with reduce_dtype=None"
    ),
    "group=, halves": Contender(
        lambda s: halves(s, False), "group=, dH in its dtype", "the same by halves of the tokens"
    ),
    "group=, halves, overlap": Contender(
        lambda s: halves(s, True), "group=, dH in its dtype",
        "the same, the sum of a half's dH beside the next half's products",
    ),
    "fusedhead.shards": Contender(
        lambda s: of_tensor_parallel(s, "fusedhead"), "group=", "ColwiseParallel, loss_parallel()", True, apart=True
    ),
    "fusedhead.shards, output Replicate": Contender(
        lambda s: of_tensor_parallel(s, "fusedhead", gather=True), "group=", "ColwiseParallel, no loss_parallel()", True
    ),
    "fusedhead.shards, sequence parallel": Contender(
        lambda s: of_tensor_parallel(s, "fusedhead", sequence=True), "sequence parallel",
        "loss_parallel(), tokens in shards", True, apart=True,
    ),
    "Inductor": Contender(
        lambda s: of_tensor_parallel(s, "inductor"), "loss_parallel", "ColwiseParallel, loss_parallel()", True
    ),
    "Inductor, sequence parallel": Contender(
        lambda s: of_tensor_parallel(s, "inductor", sequence=True), "loss_parallel, sequence parallel",
        "the same, tokens in shards", True,
    ),
}  # fmt: skip
