"""Two steps of training on each of two gloo ranks, arranged as programs arrange them, and on one process in eager.

`every_arrangement` runs on a rank (`tests.functional.ranks`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP

import fusedhead
from fusedhead.report import observers
from fusedhead.report.summary import Summary
from tests.eager_stack import backend

V, D, B, T = 1024, 16, 8, 32
STEPS = 2
Step = Callable[[Any, Tensor, Tensor], Tensor]


class Model(nn.Module):
    def __init__(self, returns: str = "logits", tied: bool = False) -> None:
        super().__init__()
        self.returns = returns
        self.embed, self.block, self.unused = nn.Embedding(V, D), nn.Linear(D, D), nn.Linear(D, D)
        self.norm, self.head = nn.LayerNorm(D), nn.Linear(D, V, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, x: Tensor, y: Tensor) -> Any:
        h = self.embed(x)
        z = self.head(self.norm(h + torch.tanh(self.block(h))))
        loss = F.cross_entropy(z.flatten(0, 1), y.flatten()) if self.returns == "both" else None
        return (z, loss) if loss is not None else z


def outside(model: Any, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x, y).flatten(0, 1), y.flatten())


def inside(model: Any, x: Tensor, y: Tensor) -> Tensor:
    return model(x, y)[1]


def read_by_one(model: Any, x: Tensor, y: Tensor) -> Tensor:
    """The loss of the model, and a read of the returned logits on rank 0 alone, after the backward."""
    logits, loss = model(x, y)
    if dist.get_rank() == 0:
        expected = F.cross_entropy(logits.flatten(0, 1), y.flatten())
        assert abs(float(expected.detach() - loss.detach())) < 1e-5
        logits.detach().sum().item()
    return loss


def read_after(model: Any, x: Tensor, y: Tensor) -> Tensor:
    """A loss whose logits are read on rank 0 when the backward has ended."""
    logits = model(x, y)
    loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
    loss.backward()
    if dist.get_rank() == 0:
        assert logits.detach().argmax(-1).shape == y.shape
    return loss.detach()


def with_both(model: Any, x: Tensor, y: Tensor) -> Tensor:
    """The loss of the model, and another one of the logits that it returns beside it."""
    logits, loss = model(x, y)
    return loss + 0.1 * torch.logsumexp(logits.flatten(0, 1), -1).square().mean()


def of_numbers(model: Any, x: Tensor, y: Tensor) -> Tensor:
    """A loss that no rule reads: the logits have to exist."""
    return model(x, y).flatten(0, 1).cumsum(-1).square().mean()


def evaluated(model: Any, x: Tensor, y: Tensor) -> Tensor:
    """A loss after an evaluation without gradients."""
    with torch.no_grad():
        outside(model, x, y)
    return outside(model, x, y)


def train(model: Any, parameters: Any, step: Step, x: Tensor, y: Tensor, micro: int = 1) -> list[Tensor]:
    """The losses of the steps, in plain gradient descent; ``micro`` batches to a step."""
    losses = []
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    for _ in range(STEPS):
        optimizer.zero_grad()
        total = torch.zeros(())
        for part in range(micro):
            if hasattr(model, "set_requires_gradient_sync"):
                model.set_requires_gradient_sync(part == micro - 1)
            loss = step(model, x[part::micro], y[part::micro]) / micro
            if loss.requires_grad:
                loss.backward()
            total = total + loss.detach()
        losses.append(total)
        optimizer.step()
    return losses


def fsdp(
    model: Model, units: Any = (), root: Any = None, rest: Any = None, policy: Any = None, copies: int = 0
) -> Model:
    """``copies``: of the model, each of which is sharded over as many ranks (HSDP)."""
    ranks = dist.get_world_size()
    sizes, names = ((copies, ranks // copies), ("replicate", "shard")) if copies else ((ranks,), ("shard",))
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=names)
    more = {"mp_policy": policy} if policy is not None else {}
    for unit in units:
        fully_shard([getattr(model, n) for n in unit] if isinstance(unit, tuple) else getattr(model, unit), mesh=mesh,
                    reshard_after_forward=rest, **more)  # fmt: skip
    fully_shard(model, mesh=mesh, reshard_after_forward=root, **more)
    return model


def compiled(model: Any) -> Any:
    return torch.compile(model, backend=backend(observers.notify))


def eager(model: Any) -> Any:
    return fusedhead.defer(model)


BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.float32)


class Arrangement(NamedTuple):
    """What the model returns, how it is wrapped, how a step is taken on ranks and on one process."""

    returns: str
    wrap: Callable[[Model], Any]
    step: Step
    alone: Step | None = None  # the same as ``step``
    tied: bool = False
    micro: int = 1
    built: int = 0  # the logits that have to exist
    narrow: bool = False  # compared with the same arrangement without us
    ranks: int = 2


def norm_and_head(model: Model, policy: Any = None) -> Model:
    return fsdp(model, ["block", ("norm", "head")], policy=policy)


ARRANGEMENTS: dict[str, Arrangement] = {
    "ddp find_unused": Arrangement("logits", lambda m: compiled(DDP(m, find_unused_parameters=True)), outside),
    "ddp static_graph": Arrangement("logits", lambda m: compiled(DDP(m, static_graph=True)), outside),
    "ddp find_unused, compiled inside": Arrangement(
        "logits", lambda m: DDP(compiled(m), find_unused_parameters=True), outside
    ),
    "ddp find_unused, eager": Arrangement("logits", lambda m: DDP(eager(m), find_unused_parameters=True), outside),
    "ddp find_unused, two losses": Arrangement(
        "both", lambda m: compiled(DDP(m, find_unused_parameters=True)), with_both
    ),
    "ddp find_unused, numbers": Arrangement(
        "logits", lambda m: DDP(eager(m), find_unused_parameters=True), of_numbers, built=2
    ),
    "fsdp returned, unread": Arrangement("both", lambda m: compiled(fsdp(m)), inside),
    "fsdp returned, unread, resharded": Arrangement("both", lambda m: compiled(fsdp(m, root=True)), inside),
    "fsdp returned, tied": Arrangement("both", lambda m: compiled(fsdp(m, ["block"])), inside, tied=True),
    "fsdp returned, read by one rank": Arrangement(
        "both", lambda m: compiled(fsdp(m, root=True)), read_by_one, alone=inside
    ),
    "fsdp two losses": Arrangement("both", lambda m: compiled(fsdp(m, ["block"])), with_both),
    "fsdp outside": Arrangement("logits", lambda m: compiled(fsdp(m)), outside),
    "fsdp outside, accumulated": Arrangement("logits", lambda m: compiled(fsdp(m)), outside, micro=2),
    "fsdp outside, resharded": Arrangement("logits", lambda m: compiled(fsdp(m, ["block"], root=True)), outside),
    "fsdp outside, compiled before": Arrangement("logits", lambda m: fsdp(compiled(m)), outside),
    "fsdp outside, numbers": Arrangement("logits", lambda m: compiled(fsdp(m, root=True)), of_numbers, built=2),
    "fsdp outside, evaluated": Arrangement("logits", lambda m: compiled(fsdp(m, root=True)), evaluated),
    "fsdp outside, read after the backward": Arrangement(
        "logits", lambda m: compiled(fsdp(m, root=True)), read_after, alone=outside
    ),
    "fsdp eager head in the root": Arrangement("logits", lambda m: eager(fsdp(m)), outside),
    "fsdp eager head alone": Arrangement("logits", lambda m: eager(fsdp(m, ["head"], rest=True)), outside),
    "fsdp eager head alone, kept": Arrangement(
        "logits", lambda m: eager(fsdp(m, ["block", "head"], rest=False)), outside
    ),
    "fsdp eager norm and head": Arrangement("logits", lambda m: eager(norm_and_head(m)), outside),
    "fsdp eager norm and head, accumulated": Arrangement("logits", lambda m: eager(norm_and_head(m)), outside, micro=2),
    "hsdp inside": Arrangement("both", lambda m: compiled(fsdp(m, ["block"], copies=2)), inside, ranks=4),
    "hsdp outside, resharded": Arrangement(
        "logits", lambda m: compiled(fsdp(m, root=True, copies=2)), outside, ranks=4
    ),
    "hsdp eager norm and head, accumulated": Arrangement(
        "logits", lambda m: eager(fsdp(m, ["block", ("norm", "head")], copies=2)), outside, micro=2, ranks=4
    ),
    "fsdp bf16": Arrangement("logits", lambda m: eager(norm_and_head(m, BF16)), outside, narrow=True),
}


def trained(name: str, wrap: Callable[[Model], Any], x: Tensor, y: Tensor) -> list[Tensor]:
    """Losses, the mean of the ranks', and parameters after training on this rank's rows."""
    how = ARRANGEMENTS[name]
    torch.manual_seed(0)
    model = Model(how.returns, how.tied)
    wrapped = wrap(model)
    losses = torch.stack([loss.float() for loss in train(wrapped, wrapped.parameters(), how.step, x, y, how.micro)])
    dist.all_reduce(losses)
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return [*(losses / dist.get_world_size()), *(p.detach().float() for p in whole)]


def alone(name: str, dtype: torch.dtype, x: Tensor, y: Tensor) -> list[Tensor]:
    """The same on one process, in eager."""
    how = ARRANGEMENTS[name]
    torch.manual_seed(0)
    model = Model(how.returns, how.tied).to(dtype)
    losses = train(model, model.parameters(), how.alone or how.step, x, y)
    return [*losses, *(p.detach() for p in model.parameters())]


def one(name: str) -> dict[str, Any]:
    how = ARRANGEMENTS[name]
    torch.compiler.reset()
    torch.manual_seed(1)
    x, y = torch.randint(0, V, (B, T)), torch.randint(0, V, (B, T))
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mine = x[rank::ranks], y[rank::ranks]
    summary = Summary()
    remove = observers.add(summary.add)
    try:
        ours = trained(name, how.wrap, *mine)
    finally:
        remove()
    plain = trained(name, lambda m: norm_and_head(m, BF16), *mine) if how.narrow else alone(name, torch.float32, x, y)
    return {
        "ours": ours,
        "plain": plain,
        "exact": alone(name, torch.float64, x, y),
        "heads": [
            {"fused": h.fused, "logits": h.logits, "deferred": h.run.deferred.value, "built": h.run.built.total,
             "answered": h.run.answered.value, "at once": h.run.at_once.total, "text": str(h)}
            for h in summary.heads()
        ],
    }  # fmt: skip


def every_arrangement() -> dict[str, Any]:
    return {name: one(name) for name, how in ARRANGEMENTS.items() if how.ranks == dist.get_world_size()}


def weight_as_an_argument() -> list[Tensor]:
    """A function that is given a gathered weight, which is resharded before the loss: ours and eager's losses."""
    results: list[Tensor] = []
    for project in (compiled(project_on), project_on):
        torch.manual_seed(0)
        head = nn.Linear(D, V, bias=False)
        fully_shard(head, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        h, y = torch.randn(B * T, D), torch.randint(0, V, (B * T,))
        head.unshard()
        logits = project(h, head.weight)
        head.reshard()
        results.append(F.cross_entropy(logits, y).detach())
    return results


def project_on(h: Tensor, w: Tensor) -> Tensor:
    return F.linear(h, w)


def few_tokens() -> list[str]:
    """The report of a head whose logits are too few for a copy of its weight."""
    torch.compiler.reset()
    summary = Summary()
    remove = observers.add(summary.add)
    model = compiled(fsdp(Model(), root=True))
    x, y = torch.randint(0, V, (1, 8)), torch.randint(0, V, (1, 8))
    outside(model, x, y).backward()
    remove()
    return [str(head) for head in summary.heads()]
