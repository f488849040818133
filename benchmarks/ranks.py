"""A process group for a benchmark, what it sends, and what its wire does.

Under torchrun the group is NCCL's (gloo's on CPUs). Without it one process stands for rank 0 of as many as are asked,
in torch's group that sends nothing, and `without_wire` puts copies of the same size in the place of collectives: what
is left is a shard's time without the wire.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.arrangements import Collective
from benchmarks.cost_model import SCHEDULES, Link
from benchmarks.measure import Step, turn

TIMEOUT = timedelta(seconds=180)  # one rank may compile longer than another
KINDS = {  # by the names that one torch or another has for them
    "all_reduce": "all_reduce",
    "all_gather_into_tensor": "all_gather",
    "all_gather_single": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter",
    "reduce_scatter_single": "reduce_scatter",
}
SIZES = (4 << 10, 64 << 10, 1 << 20, 16 << 20, 256 << 20)  # bytes of a tensor whose collectives are timed
LONG = 1 << 20  # bytes, of which fewer are timed together
REPEATS, ROUNDS = 10, 3  # of each, timed together; and how often that


def launched() -> bool:
    """Whether torchrun, or what is like it, has started this process, or there is a group already."""
    return dist.is_initialized() or ("WORLD_SIZE" in os.environ and "RANK" in os.environ)


def device_of_this_rank(kind: str) -> torch.device:
    if kind != "cuda":
        return torch.device(kind)
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


@contextmanager
def process_group(device: torch.device, ranks: int | None = None) -> Iterator[dist.ProcessGroup]:
    """The group of all ranks: torchrun's, or one process as rank 0 of ``ranks`` in a group that sends nothing.

    One that exists is used and kept. Raises RuntimeError where this torch has no group that sends nothing.
    """
    if dist.is_initialized():
        yield dist.group.WORLD  # type: ignore[misc]
        return
    if ranks is None:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    else:
        try:
            from torch.testing._internal.distributed.fake_pg import FakeStore
        except ImportError as missing:
            raise RuntimeError(f"torch {torch.__version__} has no process group that sends nothing") from missing
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield dist.group.WORLD  # type: ignore[misc]
    finally:
        dist.destroy_process_group()


Call = Callable[..., Any]


@contextmanager
def replaced(make: Callable[[str, Call], Call]) -> Iterator[None]:
    """``torch.distributed``'s collectives are ``make(name, collective)`` meanwhile."""
    before = {name: getattr(dist, name) for name in KINDS if hasattr(dist, name)}
    for name, call in before.items():
        setattr(dist, name, make(name, call))
    try:
        yield
    finally:
        for name, call in before.items():
            setattr(dist, name, call)


class Done:
    """What an asynchronous collective hands out, where nothing is sent."""

    def wait(self) -> None:
        pass


def copied(name: str, real: Call) -> Call:
    """Reads and writes what the collective would hand in and out, on this rank alone."""

    def all_reduce(x: Tensor, *args: Any, **kwargs: Any) -> Done:
        x.clone()
        return Done()

    def another_size(out: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Done:
        if x.numel() <= out.numel():
            out.view(-1, x.numel()).copy_(x.reshape(-1))
        else:
            out.view(-1).copy_(x.reshape(-1).clone()[: out.numel()])
        return Done()

    return all_reduce if name == "all_reduce" else another_size


def without_wire(step: Step) -> Step:
    """The step with copies of the same size in the place of its collectives."""

    def run() -> Any:
        with replaced(copied):
            return step()

    return run


def collectives_of(step: Step, launched: bool) -> list[Collective]:
    """What a step sends through ``torch.distributed``, in order: the bytes of whole tensors.

    Collectives that a compiler has put into its graph itself are not seen. In a group that sends nothing they are
    copies meanwhile.
    """
    seen: list[Collective] = []

    def counted(name: str, real: Call) -> Call:
        def call(*tensors: Any, **kwargs: Any) -> Any:
            whole = max((x for x in tensors if isinstance(x, Tensor)), key=Tensor.numel)
            seen.append(Collective(KINDS[name], whole.numel() * whole.element_size()))
            return real(*tensors, **kwargs)

        return call

    with nullcontext() if launched else replaced(copied), replaced(counted):
        step()
    return seen


def alone(collectives: list[Collective], ranks: int, device: torch.device) -> Step:
    """A step that makes these collectives one after the other and nothing else."""

    def operands(one: Collective) -> tuple[Tensor, Tensor]:
        numbers = int(one.nbytes) // 4 // ranks * ranks or ranks
        return torch.zeros(numbers, device=device), torch.zeros(numbers // ranks, device=device)

    calls = [(one.kind, *operands(one)) for one in collectives]
    gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
    scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)

    def run() -> tuple[Tensor, ...]:
        for kind, whole, part in calls:
            if kind == "all_reduce":
                dist.all_reduce(whole)
            elif kind == "all_gather":
                gather(whole, part)
            else:
                scatter(part, whole)
        return ()

    return run


def greatest(number: float, device: torch.device) -> float:
    """The greatest over the ranks. On a device it waits for all of them."""
    held = torch.tensor([number], dtype=torch.float64, device=device)
    dist.all_reduce(held, op=dist.ReduceOp.MAX)
    return float(held)


def times_of_collectives(
    ranks: int, device: torch.device, sizes: tuple[int, ...] = SIZES, rounds: int = ROUNDS
) -> dict[str, list[Any]]:
    """kind: [(bytes, seconds)], medians over rounds of the slowest rank."""
    by_size: dict[str, list[Any]] = {}
    for kind in dict.fromkeys(KINDS.values()):
        for nbytes in sizes:
            step = alone([Collective(kind, nbytes)], ranks, device)
            turn(step, device, 2)
            repeat = REPEATS if nbytes <= LONG else 3
            times = [greatest(turn(step, device, repeat), device) for _ in range(rounds)]
            by_size.setdefault(kind, []).append((nbytes, statistics.median(times)))
    return by_size


def link_of(times: dict[str, list[Any]], ranks: int) -> Link:
    """Latency and bandwidth of the cost model from all_reduces: the shortest one is a ring's steps, the longest one's
    bytes take the rest of its time."""
    steps, sends = SCHEDULES["all_reduce"][0](ranks)
    (_, shortest), *_, (nbytes, longest) = times["all_reduce"]
    return Link(shortest / steps, sends * nbytes / max(longest - shortest, 1e-9))
