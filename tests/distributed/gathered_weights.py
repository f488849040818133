"""Programs in which FSDP frees a weight between a forward and what is made of its logits; run on ranks.

Each gives what a program of its kind can see, with deferred logits or with eager code's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

import fusedhead
from benchmarks.measure import cpu_allocations, peak_of
from fusedhead.deferred import gathered_weights
from fusedhead.report import observers
from fusedhead.report.summary import Summary
from tests.distributed.arrangements import STEPS, Model, V, compiled, fsdp, inside, outside, train

ROWS, LENGTH = 4, 32


def batches(count: int = 2) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(7 + dist.get_rank())
    return [(torch.randint(0, V, (ROWS, LENGTH)), torch.randint(0, V, (ROWS, LENGTH))) for _ in range(count)]


def model_of(ours: bool, returns: str = "logits", root: Any = None) -> Any:
    torch.manual_seed(0)
    model = fsdp(Model(returns), ["block"], root=root)
    return compiled(model) if ours else model


def gradients(model: Any) -> list[Tensor]:
    return [p.grad.full_tensor() for p in model.parameters() if p.grad is not None]


def two_forwards(model: Any) -> list[Tensor]:
    """Both losses are taken before the first backward, which frees the weight that the second loss is of."""
    one, two = (outside(model, x, y) for x, y in batches())
    one.backward()
    two.backward()
    return [one.detach(), two.detach(), *gradients(model)]


def resharded_between(model: Any) -> list[Tensor]:
    """The weight is freed by hand between a loss and its backward."""
    (x, y), _ = batches()
    loss = outside(model, x, y)
    unit(model).reshard()
    loss.backward()
    return [loss.detach(), *gradients(model)]


def saved_between(model: Any) -> list[Tensor]:
    """A checkpoint is taken between a forward and its loss, and one rank reads the logits."""
    (x, y), _ = batches()
    logits = model(x, y)
    model.state_dict()
    seen = logits.detach().argmax(-1).sum() if dist.get_rank() == 0 else torch.zeros(())
    loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
    loss.backward()
    return [loss.detach(), seen, *gradients(model)]


def read_in_the_next_step(model: Any) -> list[Tensor]:
    """Logits that are held while the weights are stepped and gathered anew, and read on one rank after it."""
    first, second = batches()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    held = model(*first)
    loss = outside(model, *second)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    outside(model, *second).backward()
    return [held.detach().clone() if dist.get_rank() == 0 else loss.detach()]


def read_numbers_then_freed(model: Any) -> list[Tensor]:
    """Numbers of the logits are asked for, the weight is freed, and a gradient passes them."""
    (x, y), _ = batches()
    logits = model(x, y)
    seen = logits.detach().sum()
    square = logits.cumsum(-1).square().mean()
    unit(model).reshard()
    square.backward()
    return [seen, square.detach(), *gradients(model)]


def in_chunks(model: Any) -> list[Tensor]:
    """The head is called for chunks of its hidden states, none of which is as large as the weight."""
    (x, y), _ = batches()
    losses = []
    chunks = [model(a, b) for a, b in zip(x.unflatten(1, (4, -1)).unbind(1), y.unflatten(1, (4, -1)).unbind(1))]
    for logits, labels in zip(chunks, y.unflatten(1, (4, -1)).unbind(1)):
        losses.append(F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum"))
    sum(losses).backward()  # type: ignore[union-attr]
    return [torch.stack(losses).detach(), *gradients(model)]


def evaluated_and_collected(model: Any) -> list[Tensor]:
    """Logits of several batches are collected without gradients, and read when a training step has freed the weight."""
    with torch.no_grad():
        collected = [model(x, y) for x, y in batches()]
    outside(model, *batches(1)[0]).backward()
    return [torch.cat([z.flatten(0, 1) for z in collected]).logsumexp(-1)]


def unit(model: Any) -> Any:
    return getattr(model, "_orig_mod", model)


PROGRAMS: dict[str, Callable[[Any], list[Tensor]]] = {
    f.__name__: f
    for f in (
        two_forwards, resharded_between, saved_between, read_in_the_next_step, read_numbers_then_freed,
        evaluated_and_collected, in_chunks,
    )
}  # fmt: skip


@contextmanager
def copies_counted() -> Iterator[list[int]]:
    """The bytes of each copy that is taken when a weight is freed."""
    results: list[int] = []
    original = gathered_weights.provide

    def provide(waiting: Any) -> None:
        original(waiting)
        kept = {leaf.untyped_storage()._cdata: leaf.untyped_storage().nbytes() for _, own in waiting for leaf, _ in own}
        results.extend(kept.values())

    gathered_weights.provide = provide  # type: ignore[assignment]
    try:
        yield results
    finally:
        gathered_weights.provide = original


def every_program() -> dict[str, Any]:
    """Of each program and root: what ours and eager code give, and the bytes that were copied."""
    results = {}
    for name, program in PROGRAMS.items():
        for root in (None, True):
            torch.compiler.reset()
            with copies_counted() as copied:
                ours = program(model_of(True, root=root))
            results[f"{name}, {'resharded' if root else 'kept'}"] = {
                "ours": ours, "eager": program(model_of(False, root=root)), "copied": copied,
            }  # fmt: skip
    return results


def unseen() -> dict[str, Any]:
    """The same where this torch frees weights in a way that nobody knows: operands are copied at once."""
    gathered_weights._seeing[:] = [False]
    results = {}
    for name in ("saved_between", "read_in_the_next_step"):
        torch.compiler.reset()
        with copies_counted() as copied:
            ours = PROGRAMS[name](model_of(True, root=True))
        results[name] = {"ours": ours, "eager": PROGRAMS[name](model_of(False, root=True)), "copied": copied}
    return results


def held_in(model: Any, keep: bool) -> int:
    """The peak of a training step whose logits are dropped, or held until the next one returns."""
    held: Any = None
    (x, y), *_ = batches()
    for _ in range(2):  # everything is compiled
        held = stepped(model, x, y, keep, held)

    _, allocated = cpu_allocations(lambda: stepped(model, x, y, keep, held))
    return peak_of(allocated)


def stepped(model: Any, x: Tensor, y: Tensor, keep: bool, held: Any) -> Any:
    logits, loss = model(x, y)
    held = logits if keep else None
    del logits
    loss.backward()
    model.zero_grad()
    return held


def memory() -> dict[str, Any]:
    """Peaks of a step of a model that returns (logits, loss), ours and without us, and the bytes that were copied."""
    results = {}
    for root in (None, True):
        for keep in (False, True):
            peaks = []
            with copies_counted() as copied:
                for ours in (True, False):
                    torch.compiler.reset()
                    torch.manual_seed(0)
                    model = fsdp(Model("both"), root=root)
                    model = compiled(model) if ours else torch.compile(model, backend="aot_eager")
                    peaks.append(held_in(model, keep))
            results[f"{'resharded' if root else 'kept'}, {'held' if keep else 'dropped'}"] = (*peaks, copied)
    return results


def fsdp1(model: Model, flat: bool) -> Any:
    return FullyShardedDataParallel(model, use_orig_params=not flat, device_id=torch.device("cpu"))


def everywhere(model: Any) -> Any:
    fusedhead.enable()
    return model


FSDP1: dict[str, tuple[str, Callable[[Model], Any], Any]] = {
    "compiled, loss inside": ("both", lambda m: compiled(fsdp1(m, False)), inside),
    "compiled, loss outside": ("logits", lambda m: compiled(fsdp1(m, False)), outside),
    "compiled before, loss outside": ("logits", lambda m: fsdp1(compiled(m), False), outside),
    "eager, by hand": ("logits", lambda m: fusedhead.defer(fsdp1(m, False)), outside),
    "eager, flat, everywhere": ("logits", lambda m: everywhere(fsdp1(m, True)), outside),
    "compiled, flat, loss inside": ("both", lambda m: everywhere(compiled(fsdp1(m, True))), inside),
    "compiled before, flat, loss inside": ("both", lambda m: everywhere(fsdp1(compiled(m), True)), inside),
}


def every_fsdp1() -> dict[str, Any]:
    """Losses with us and without, and the report, of each arrangement."""
    results = {}
    for name, (returns, wrap, step) in FSDP1.items():
        torch.compiler.reset()
        summary = Summary()
        remove = observers.add(summary.add)
        losses = []
        for make in (wrap, lambda m: fsdp1(m, False)):
            torch.manual_seed(0)
            model = make(Model(returns))
            (x, y), _ = batches()
            losses.append(train(model, model.parameters(), step, x, y))
            fusedhead.disable()
        remove()
        results[name] = {
            "losses": losses,
            "heads": [{"fused": h.fused, "reason": h.reason, "module": h.module} for h in summary.heads()],
        }
    return results


class Tied(nn.Module):
    """A model that multiplies by its embedding itself."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.block = nn.Embedding(V, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.embed(x)
        return F.linear(h + torch.tanh(self.block(h)), self.embed.weight)


def tied_products() -> dict[str, Any]:
    """A model that multiplies by its embedding itself under FSDP2 and DDP: losses with us and without, the report."""
    results = {}
    wraps: dict[str, Callable[[Any], Any]] = {
        "fsdp": lambda m: fsdp(m, ["block"]),
        "fsdp, resharded": lambda m: fsdp(m, root=True),
        "ddp": nn.parallel.DistributedDataParallel,
        "ddp, static_graph": lambda m: nn.parallel.DistributedDataParallel(m, static_graph=True),
    }
    for name, wrap in wraps.items():
        summary = Summary()
        remove = observers.add(summary.add)
        losses = []
        for ours in (True, False):
            torch.manual_seed(0)
            model: Any = Tied()
            if ours:
                fusedhead.defer(model)
            model = wrap(model)
            (x, y), _ = batches()
            losses.append(train(model, model.parameters(), outside, x, y))
        remove()
        results[name] = {"losses": losses, "answered": [h.run.answered.value for h in summary.heads()], "steps": STEPS}
    return results
